"""Bugs for mutants.py in what a run is made into: merged weights, exports, uploads, cards; and in the data checks and the sandbox."""

from __future__ import annotations

from reliability.mutant_list import Mutant

_MERGING, _EXPORTING, _LIKELIHOODS = "gemma_grpo/model/merging.py", "gemma_grpo/export/exporting.py", "gemma_grpo/export/likelihoods.py"
_STAGING, _UPLOAD = "gemma_grpo/export/staging.py", "gemma_grpo/upload.py"
_CELL, _RUNNING, _UNIT_TESTS = (f"gemma_grpo/reward/sandbox/{name}.py" for name in ("cell", "running", "unit_tests"))
_MERGED, _EXPORTED, _LOADED = "tests/model/test_merging.py", "tests/export/test_export.py", "tests/reward/sandbox/test_under_load.py"

MUTANTS_OF_EXPORTS = (
    # ---- merging
    Mutant(
        "rsLoRA is scaled as LoRA is", _MERGING,
        "(math.sqrt(config.r) if config.use_rslora else config.r)", "config.r",
        f"{_MERGED}::test_the_scale_is_alpha_over_r_or_over_its_root",
    ),
    Mutant(
        "the change is rounded before it is added", _MERGING,
        "stored = (whole + delta).to(stored_as)", "stored = weight.to(stored_as) + delta.to(stored_as)",
        f"{_MERGED}::test_a_change_below_half_the_last_digit_is_counted_as_lost",
    ),
    Mutant(
        "a layer that the base lacks is let go", _MERGING,
        "    if missing:\n", "    if False:\n",
        f"{_MERGED}::test_an_adapter_of_another_shape_is_refused",
    ),
    Mutant(
        "an adapter of zeros is merged", _MERGING,
        "    if not any(bool(torch.count_nonzero(delta.whole())) for delta in deltas.values()):\n", "    if False:\n",
        f"{_MERGED}::test_an_adapter_that_adds_nothing_or_is_damaged_is_refused",
    ),
    Mutant(
        "a merge that changed nothing is a success", _MERGING,
        "    if not merged.changed:\n", "    if False:\n",
        f"{_MERGED}::test_a_merge_that_changes_nothing_is_refused_and_float32_keeps_it",
    ),
    Mutant(
        "the vision tower is left behind", _MERGING,
        "                delta = missing.pop(name, None)\n",
        "                delta = missing.pop(name, None)\n                if \"vision\" in key:\n                    continue\n",
        f"{_MERGED}::test_a_merged_multimodal_checkpoint_is_base_and_adapter_with_its_vision_tower",
    ),
    # ---- exports
    Mutant(
        "an export is not read again", _EXPORTING,
        "    if why := why_not(apart, measured.moved, exact=exact):\n", "    if why := \"\":\n",
        f"{_EXPORTED}::test_files_that_are_not_the_policy_are_found_out",
    ),
    Mutant(
        "an export may be as far away as the base is", _LIKELIHOODS,
        "MOST_LOST = 0.5\n", "MOST_LOST = 1.5\n",
        f"{_EXPORTED}::test_limits_by_hand",
    ),
    Mutant(
        "other likeliest tokens are let pass", _LIKELIHOODS,
        "(exported.largest > MAX_APART_FP32 or exported.agreement < 1)", "exported.largest > MAX_APART_FP32",
        f"{_EXPORTED}::test_limits_by_hand",
    ),
    Mutant(
        "a folder that is no export is replaced", _STAGING,
        "not (overwrite and ours)", "not overwrite",
        f"{_EXPORTED}::test_what_is_in_the_way_is_never_replaced_unasked",
    ),
    # ---- uploads and cards
    Mutant(
        "a token that reads may write", _UPLOAD,
        "        return role == \"write\"\n", "        return role in (\"read\", \"write\")\n",
        "tests/test_upload.py::test_whether_a_token_writes_is_asked_of_the_hub",
    ),
    Mutant(
        "uploads are public", _UPLOAD,
        "private=not public", "private=public",
        "tests/test_upload.py::test_an_export_is_uploaded_whole_and_private",
    ),
    # ---- the sandbox
    Mutant(
        "a file is looked for while the root moves", _CELL,
        "    for number in (0, 1, 2):\n        os.close(number)\n",
        "    nothing = os.open(\"/dev/null\", os.O_RDWR) if os.path.exists(\"/dev/null\") else None\n"
        "    for number in (0, 1, 2):\n        os.close(number) if nothing is None else os.dup2(nothing, number)\n",
        f"{_LOADED}::test_a_crowd_of_programs_all_end_alike",
    ),
    Mutant(
        "a program that the machine killed has failed", _RUNNING,
        "if outcome != _KILLED or attempt == _ATTEMPTS - 1:", "if True:",
        f"{_LOADED}::test_a_program_that_a_machine_short_of_memory_killed_is_run_again",
    ),
    Mutant(
        "time that nobody watched is the program's", _RUNNING,
        "min(now - self.looked, STEP_SECONDS)", "now - self.looked",
        f"{_LOADED}::test_time_in_which_nobody_watched_is_not_the_programs",
    ),
    Mutant(
        "what goes slowly has failed", _RUNNING,
        "while selector.get_map() or self._ended(0) is None:", "while selector.get_map():",
        f"{_LOADED}::test_what_it_was_shut_in_with_may_be_slow_to_go",
    ),
    Mutant(
        "the network is left open", _CELL,
        "0x10000000 | 0x20000000 | 0x40000000 | ", "0x10000000 | 0x20000000 | ",
        "tests/reward/sandbox/test_hostile.py::test_a_hostile_program_does_no_harm_and_is_reported",
    ),
    Mutant(
        "half of a score is for calls that return anything", _UNIT_TESTS,
        "return (RAN_SHARE * len(returned) + (1 - RAN_SHARE) * passed) / len(tests)",
        "return (len(returned) + passed) / (2 * len(tests))",
        "tests/reward/sandbox/test_unit_tests.py::test_the_score_is_the_share_of_tests_passed_and_a_tenth_for_calls_that_return",
    ),
)
