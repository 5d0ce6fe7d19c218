"""The bugs that are planted by mutants.py: where, what it becomes, and the test that must notice."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One bug: `old`, which is in `file` once, becomes `new`."""

    name: str
    file: str
    old: str
    new: str
    test: str


_FAULTS, _CHECKPOINT = "tests/test_checkpoint_faults.py", "tests/test_checkpoint.py"
_INSIDE, _RESUME, _NUMBERS = "tests/grpo/test_inside_a_step.py", "tests/grpo/test_resume.py", "tests/grpo/test_numbers.py"
_AFTER_ANY_STEP = f"{_RESUME}::test_a_run_continued_after_any_step_equals_the_uninterrupted_one"

MUTANTS = (
    # ---- checkpoints
    Mutant(
        "a file of a checkpoint is not synced", "gemma_grpo/checkpoint.py",
        "        disk.sync(folder / name)\n", "",
        f"{_FAULTS}::test_no_power_cut_loses_what_was_saved",
    ),
    Mutant(
        "a checkpoint's name is not synced", "gemma_grpo/checkpoint.py",
        "        disk.rename(folder / f\"{_STAGED}{final.name}\", final)\n        disk.sync(folder)\n",
        "        disk.rename(folder / f\"{_STAGED}{final.name}\", final)\n",
        f"{_FAULTS}::test_no_power_cut_loses_what_was_saved",
    ),
    Mutant(
        "no staging: written under the final name", "gemma_grpo/checkpoint.py",
        "        _stage(folder / f\"{_STAGED}{final.name}\", {**content, MANIFEST: _manifest(step, content)}, disk)\n"
        "        if os.path.lexists(final):\n            disk.rename(final, folder / f\"{_REPLACED}{final.name}\")\n"
        "        disk.rename(folder / f\"{_STAGED}{final.name}\", final)\n",
        "        if os.path.lexists(final):\n            disk.rename(final, folder / f\"{_REPLACED}{final.name}\")\n"
        "        _stage(final, {**content, MANIFEST: _manifest(step, content)}, disk)\n",
        f"{_FAULTS}::test_a_save_that_fails_at_any_operation_leaves_what_was_there",
    ),
    Mutant(
        "the manifest does not hash itself", "gemma_grpo/checkpoint.py",
        "    if not whole:\n", "    if False:\n",
        f"{_CHECKPOINT}::test_flipped_bits_are_all_seen_and_named",
    ),
    Mutant(
        "a file's hash is not compared", "gemma_grpo/checkpoint.py",
        "        if _sha256(content[name]) != sha256:\n", "        if False:\n",
        f"{_CHECKPOINT}::test_flipped_bits_are_all_seen_and_named",
    ),
    Mutant(
        "older checkpoints go before the new one is read back", "gemma_grpo/checkpoint.py",
        "    _check_readable(final, folder / f\"{_REPLACED}{final.name}\", disk)\n"
        "    _prune(folder, _by_step(folder, up_to=step)[max(2, keep) :] if keep else [], disk)\n",
        "    _prune(folder, _by_step(folder, up_to=step)[max(2, keep) :] if keep else [], disk)\n"
        "    _check_readable(final, folder / f\"{_REPLACED}{final.name}\", disk)\n",
        f"{_FAULTS}::test_a_disk_that_gives_back_something_else_is_noticed_before_an_older_one_goes",
    ),
    Mutant(
        "the newest checkpoint is the youngest file", "gemma_grpo/checkpoint.py",
        "key=_step, reverse=True)", "key=lambda path: path.stat().st_mtime, reverse=True)",
        f"{_CHECKPOINT}::test_the_newest_is_taken_and_order_is_by_step",
    ),
    Mutant(
        "when no checkpoint is whole the run starts over", "gemma_grpo/checkpoint.py",
        "    if damaged:\n        listed", "    if False:\n        listed",
        f"{_CHECKPOINT}::test_when_none_is_whole_every_one_is_named_with_its_file",
    ),
    # ---- going on
    Mutant(
        "the rollout buffer is not saved", "gemma_grpo/grpo/keeping.py",
        'options = self.run.checkpoints, {"rollout": rollout,', 'options = self.run.checkpoints, {"rollout": None,',
        f"{_INSIDE}::test_what_a_stopped_step_had_is_not_done_again",
    ),
    Mutant(
        "the last pass of a planning cycle is not made again", "gemma_grpo/grpo/update.py",
        '            self.optimizer.apply(made.gradient, made.numbers["rate"])\n        goes_on = True\n',
        "            pass\n        goes_on = True\n",
        f"{_INSIDE}::test_what_a_stopped_step_had_is_not_done_again",
    ),
    Mutant(
        "the step counter starts at 0 again", "gemma_grpo/grpo/trainer.py",
        "        self.step = checkpoint.step\n", "        self.step = 0\n", _AFTER_ANY_STEP,
    ),
    Mutant(
        "Adam's moments are forgotten", "gemma_grpo/grpo/update.py",
        "        self.optimizer.load(tensors)\n", "", _AFTER_ANY_STEP,
    ),
    Mutant(
        "the controllers start anew", "gemma_grpo/grpo/update.py",
        "        self.optimizer.load(tensors)\n        self._load_controllers(controllers)\n", "        self.optimizer.load(tensors)\n",
        _AFTER_ANY_STEP,
    ),
    Mutant(
        "the count of tokens starts at 0 again", "gemma_grpo/grpo/keeping.py",
        '        stepper.num_tokens = state["num_tokens"]\n', "", _AFTER_ANY_STEP,
    ),
    Mutant(
        "logs are not cut back", "gemma_grpo/grpo/keeping.py",
        '        self.run.truncate(state["offsets"])\n', "", _AFTER_ANY_STEP,
    ),
    Mutant(
        "dropout is seeded from the clock", "gemma_grpo/grpo/update.py",
        "torch.manual_seed(self.config.seed * 1_000_003 + update)", "torch.seed()",
        f"{_RESUME}::test_a_repeated_run_writes_identical_logs",
    ),
    Mutant(
        "dropout goes on from wherever torch's generator is", "gemma_grpo/grpo/update.py",
        "torch.manual_seed(self.config.seed * 1_000_003 + update)", "torch.manual_seed(self.config.seed) if update == 0 else None",
        _AFTER_ANY_STEP,
    ),
    Mutant(
        "other data are accepted", "gemma_grpo/grpo/resuming.py",
        "    elif began != now:\n", "    elif False:\n", f"{_RESUME}::test_other_data_is_refused",
    ),
    Mutant(
        "a changed base is accepted", "gemma_grpo/grpo/resuming.py",
        "    if other:\n", "    if False:\n", f"{_RESUME}::test_a_base_with_one_flipped_bit_is_refused_by_its_tensors_name",
    ),
    Mutant(
        "another run's checkpoint is accepted", "gemma_grpo/grpo/keeping.py",
        "        check_origin(checkpoint, self.origin)\n", "", f"{_INSIDE}::test_a_checkpoint_of_another_run_is_refused",
    ),
    Mutant(
        "the reward adapter's training starts over", "gemma_grpo/grpo/keeping.py",
        "        self._restore(training)\n", "", f"{_INSIDE}::test_the_reward_adapters_training_goes_on_after_its_last_update",
    ),
    # ---- signals
    Mutant(
        "a stop is not looked for while sampling", "gemma_grpo/rollout/running.py",
        "            check()\n", "", f"{_INSIDE}::test_a_stop_is_looked_for_at_every_token_sampled",
    ),
    Mutant(
        "a second signal is only another request", "gemma_grpo/stopping.py",
        "        os._exit(EXIT_CODE)\n", "        return\n", "tests/test_stopping.py::test_a_second_signal_ends_at_once",
    ),
    # ---- numbers
    Mutant(
        "gradients are not checked", "gemma_grpo/grpo/update.py",
        "            if not torch.isfinite(tensor).all():\n", "            if False:\n",
        f"{_NUMBERS}::test_a_gradient_that_is_not_finite_is_named_and_updates_nothing_further",
    ),
    Mutant(
        "updated weights are not checked", "gemma_grpo/grpo/update.py",
        "        broken = self.optimizer.not_finite()\n", "        broken = None\n",
        f"{_NUMBERS}::test_an_update_that_makes_a_weight_not_finite_is_taken_back",
    ),
    Mutant(
        "a spike is counted and updated on", "gemma_grpo/grpo/update.py",
        "            self._refuse_spike(norm, step)\n            return made, False\n", "            self._refuse_spike(norm, step)\n",
        f"{_NUMBERS}::test_a_spike_is_left_out_counted_and_told",
    ),
    Mutant(
        "a run that learned nothing is a success", "gemma_grpo/grpo/trainer.py",
        "        if signal.lost or signal.never_there:", "        if signal.lost:",
        f"{_NUMBERS}::test_a_run_in_which_no_reward_told_anything_apart_is_no_success",
    ),
    Mutant(
        "the watchdog forgets how long phases took", "gemma_grpo/watchdog.py",
        "    _state.seconds[name].append(time.monotonic() - now.started)\n", "",
        "tests/test_watchdog.py::test_a_phase_far_over_its_median_is_told_with_its_detail_and_its_place",
    ),
)  # fmt: skip
