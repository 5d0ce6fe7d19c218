"""More bugs for mutants.py: in what is done about rewards, data, recipes, code and text of others, and about other processes."""

from __future__ import annotations

from reliability.mutant_list import Mutant

_ISOLATED, _FUNCTIONS, _BASE = (f"gemma_grpo/reward/{name}.py" for name in ("isolated", "functions", "base"))
_IN_A_CHILD, _KINDS = "tests/reward/test_isolated.py", "tests/reward/test_bad_rewards.py"
_STOPS, _SKIPS = (
    f"{_KINDS}::test_a_bad_reward_stops_the_run_with_its_exact_words",
    f"{_KINDS}::test_a_bad_reward_is_skipped_and_counted_where_that_is_asked_for",
)
_EVENTS, _PLACES, _SIGNALS = "tests/monitor/test_events.py", "tests/reliability/test_places.py", "tests/reliability/test_signals.py"

MUTANTS_OF_STRANGERS = (
    # ---- rewards
    Mutant(
        "one score is given to all completions", _BASE,
        "    count, nothing = len(prompts), [None] * len(prompts)\n",
        "    count, nothing = len(prompts), [None] * len(prompts)\n"
        "    values = values * count if values and len(values) == 1 else values\n",
        _STOPS,
    ),
    Mutant(
        "a score beyond float32 is let in", _BASE,
        "    if not abs(number) < FLOAT32_END:\n        raise _Un", "    if False:\n        raise _Un", _STOPS,
    ),
    Mutant(
        "True is a score", _BASE,
        "if isinstance(plain, bool) or not isinstance(plain, Real):", "if not isinstance(plain, Real):", _STOPS,
    ),
    Mutant(
        "what cannot be used counts as 0", _BASE,
        "            checked.append(None)\n            unusable", "            checked.append(0.0)\n            unusable", _SKIPS,
    ),
    Mutant(
        "sys.exit in a reward ends the program as a success", _FUNCTIONS,
        "        except BaseException as error:\n", "        except Exception as error:\n", _STOPS,
    ),
    Mutant(
        "skipped completions are not counted", _FUNCTIONS,
        "return Skipped(answer.skipped, f", "return Skipped(0, f", "tests/reward/test_functions.py::test_causes_are_counted_apart",
    ),
    Mutant(
        "any share may be skipped", _FUNCTIONS,
        "if answer.skipped > self.settings.max_skipped * count:", "if False:",
        "tests/reward/test_functions.py::test_more_than_the_share_that_may_be_skipped_stops_the_run",
    ),
    Mutant(
        "a reward's children outlive it", _ISOLATED,
        "found = descendants(self.pid) - killed", "found = set[int]()",
        f"{_IN_A_CHILD}::test_what_a_call_started_does_not_outlive_it_when_it_answers_either",
    ),
    Mutant(
        "a reward outlives its trainer", _ISOLATED,
        "        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)\n", "",
        f"{_IN_A_CHILD}::test_a_trainer_that_is_killed_leaves_no_process_behind",
    ),
    Mutant(
        "a stop is not looked for while a reward is waited for", _ISOLATED,
        "                check()\n", "", f"{_IN_A_CHILD}::test_a_request_to_stop_is_noticed_while_it_is_waited_for",
    ),
    Mutant(
        "a reward that hung is not reaped", _ISOLATED,
        "                os.waitpid(self.pid, 0)\n", "                pass\n",
        f"{_IN_A_CHILD}::test_a_late_call_is_killed_with_all_it_started_also_what_made_itself_a_session",
    ),
    # ---- code, secrets, text
    Mutant(
        "code is read a second time after it was hashed", "gemma_grpo/reward/allowed_code.py",
        "self.source_to_code(self.code.data,", "self.source_to_code(self.code.path.read_bytes(),",
        "tests/reward/test_allowed_code.py::test_what_runs_is_what_was_read_and_hashed_whatever_the_file_says_later",
    ),
    Mutant(
        "changed code runs without being asked about", "gemma_grpo/cli/allowing.py",
        "(began := _recorded(run_dir)) != code.sha256", "(began := _recorded(run_dir)) not in (code.sha256, 'unknown')",
        "tests/test_cli_allow_code.py::test_a_run_that_does_not_say_its_code_began_with_another",
    ),
    Mutant(
        "any name is a reward", "gemma_grpo/grpo/setup.py",
        "        if name not in BUILT_IN and name not in functions:\n", "        if False:\n",
        "tests/config/test_hostile_recipes.py::test_a_reward_is_a_name_from_a_list_and_never_a_place",
    ),
    Mutant(
        "a link out of the run directory is followed", "gemma_grpo/containment.py",
        "not Path(target).is_relative_to(root)", "not target.startswith(root)",
        "tests/test_containment.py::test_a_link_by_relative_steps_or_through_another_link_is_seen",
    ),
    Mutant(
        "events hold secrets", "gemma_grpo/monitor/events.py",
        '"kind": kind, **redact_all(fields)}', '"kind": kind, **fields}',
        "tests/test_redact.py::test_what_a_run_writes_of_texts_holds_no_secret",
    ),
    Mutant(
        "a folder of pickled weights has its tokenizer loaded", "gemma_grpo/model/gemma.py",
        "        weight_files(folder)  # read later; what is wrong with them is said now\n", "",
        "tests/model/test_foreign_checkpoints.py::test_weights_as_a_pickle_alone_are_refused_unread",
    ),
    Mutant(
        "a key given twice in a list is accepted", "gemma_grpo/config/document.py",
        "if isinstance(node, yaml.SequenceNode):", "if False:",
        "tests/config/test_hostile_recipes.py::test_a_hostile_document_is_refused_at_once",
    ),
    Mutant(
        "fake turns in a canary are control tokens", "gemma_grpo/reward/canaries.py",
        "encode_plain(tokenizer, text)", "tokenizer.encode(text, add_special_tokens=False)",
        "tests/reward/test_canaries.py::test_fake_turns_never_become_control_tokens",
    ),
    # ---- other processes, disks, signals
    Mutant(
        "the holder's host is not named", "gemma_grpo/monitor/events.py",
        "found[2] == socket.gethostname()", "True", f"{_EVENTS}::test_a_lock_that_another_machine_left_is_named_and_can_be_taken_away",
    ),
    Mutant(
        "a file system without locks is trusted", "gemma_grpo/monitor/events.py",
        "if isinstance(lock, SoftFileLock):", "if False:",
        f"{_EVENTS}::test_a_file_system_without_locks_is_refused_and_nothing_is_left_there",
    ),
    Mutant(
        "a place is not tried before the model loads", "gemma_grpo/monitor/durable.py",
        "if folder.is_symlink():", "if False:", _PLACES,
    ),
    Mutant(
        "readers see half a file", "gemma_grpo/monitor/durable.py",
        "        write_whole(path, text.encode())\n", "        path.write_text(text)\n", "tests/reliability/test_readers.py",
    ),
    Mutant(
        "a hangup is not heard", "gemma_grpo/stopping.py",
        '*([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])', "",
        f"{_SIGNALS}::test_an_interrupt_and_a_hangup_are_requests_as_a_termination_is",
    ),
    Mutant(
        "never stopping is not told", "gemma_grpo/grpo/explain.py",
        " or (len(cut_off) > CUT_OFF_STEPS and cut_off[0])", "", "tests/grpo/test_never_stops.py",
    ),
)  # fmt: skip
