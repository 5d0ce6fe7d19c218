"""`gemma-grpo train-reward`, `train`, `evaluate`, `report`: from words on a command line to the trainer and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemma_grpo.access import checkpoint_folder
from gemma_grpo.cards import present_card
from gemma_grpo.cli.allowing import AllowCode, CodeHash, allowed_code
from gemma_grpo.cli.compare import baseline_lines
from gemma_grpo.cli.printing import say
from gemma_grpo.cli.ranks import start_ranks
from gemma_grpo.cli.summary import canned_lines, evaluation_lines, read_calibration, reward_lines, task_lines
from gemma_grpo.config import GRPOConfig, load_recipe, parse_overrides
from gemma_grpo.escapes import printable
from gemma_grpo.launched import is_first, world_size
from gemma_grpo.planner import PreflightError, find_shape, plan_run

if TYPE_CHECKING:
    from gemma_grpo.grpo.trainer import GRPOTrainer
    from gemma_grpo.reward.allowed_code import CodeFile

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or a name from `gemma-grpo recipes list`.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings on top, such as max_steps=20 kl.beta=0.1.")]
Force = Annotated[bool, typer.Option("--force", help="Run even if the plan says that it does not fit in memory.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, such as runs/miniature-1.")]


def train(
    recipe: Recipe,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Load and check data, model, rewards; show the plan; train nothing.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in output_dir; done anyway where there is one.")] = False,
    force: Force = False,
    profile: Annotated[bool, typer.Option("--profile", help="Show where the time goes, beside what this machine could do.")] = False,
    push_to_hub: Annotated[
        str | None, typer.Option("--push-to-hub", metavar="USER/NAME", help="Upload the adapter at the end; asked for now whether it may.")
    ] = None,
    allow_code: AllowCode = None,
    code_sha256: CodeHash = None,
) -> int:
    """Train a policy: the reward adapter first if there is none, then GRPO, then before and after on held-out prompts."""
    if dry_run and profile:
        raise ValueError("--dry-run makes no step, so there is nothing to profile. Leave one of the two out.")
    if push_to_hub is not None:
        from gemma_grpo.upload import check_write_access

        check_write_access(push_to_hub)  # before torch is loaded, and data is fetched
    config = load_recipe(recipe, parse_overrides(overrides or [], recipe))
    if config.gpus > 1 and world_size() == 1 and not dry_run:
        return start_ranks(config)
    output = config.output_dir
    goes_on = resume or (output is not None and (Path(output) / "recipe.yaml").is_file())
    code = allowed_code(allow_code, code_sha256, Path(output) if goes_on and output else None)
    trainer = _trainer(recipe, overrides, check_fit=not (force or goes_on), code=code)
    if dry_run:
        say(*plan_lines(trainer.dry_run(force=force)))
        return 0

    from gemma_grpo.monitor.report import write_report

    evaluation = trainer.train(resume_from_checkpoint=goes_on, force=force, profile=profile, push_to_hub=push_to_hub)
    if not is_first():
        return 0
    path = write_report(trainer.run_dir)
    say("", *reward_lines(read_calibration(trainer.run_dir)), *evaluation_lines(evaluation))
    say(f"adapter: {trainer.run_dir / 'adapter'}\nreport:  {path}")
    return 0


def train_reward(
    recipe: Recipe, overrides: Overrides = None, force: Force = False, allow_code: AllowCode = None, code_sha256: CodeHash = None
) -> int:
    """Train only the reward adapter on the preference pairs, and measure it on held-out ones; a training in output_dir goes on."""
    config = load_recipe(recipe, parse_overrides(overrides or [], recipe))
    if config.gpus > 1 and world_size() == 1:
        return start_ranks(config)
    output = config.output_dir
    goes_on = output is not None and (Path(output) / "recipe.yaml").is_file()
    trainer = _trainer(recipe, overrides, code=allowed_code(allow_code, code_sha256, Path(output) if goes_on and output else None))
    calibration = trainer.train_reward(resume_from_checkpoint=goes_on, force=force)
    say(*reward_lines(calibration), f"reward adapter: {trainer.run_dir / 'reward'}")
    return 0


def evaluate(
    run: Run,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Also best-of-n by the reward, and DPO and SFT on its pairs: trains both.")
    ] = False,
    tasks: Annotated[
        str | None, typer.Option("--tasks", metavar="NAME,NAME", help="Also tasks of the lm-evaluation-harness, such as arc_easy,gsm8k.")
    ] = None,
    task_limit: Annotated[int | None, typer.Option("--task-limit", min=1, help="Only the first so many questions of each task.")] = None,
    allow_code: AllowCode = None,
    code_sha256: CodeHash = None,
) -> None:
    """Compare before and after on held-out prompts, and write evaluation.json."""
    code = allowed_code(allow_code, code_sha256, run)
    config = None if code is None else load_recipe(run / "recipe.yaml")
    from gemma_grpo.grpo.abilities import check_tasks
    from gemma_grpo.grpo.setup import functions_of
    from gemma_grpo.grpo.trainer import GRPOTrainer
    from gemma_grpo.stopping import listening

    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if task_limit is not None and not names:
        raise ValueError("--task-limit says how many questions of each task, and --tasks names none. Add --tasks NAME,NAME.")
    check_tasks(names)

    trainer = GRPOTrainer.from_run(run, reward_functions=functions_of(code, config) if code and config else None)
    with trainer.view, listening():
        evaluation = trainer.evaluate(baselines=baselines, tasks=names, task_limit=task_limit)
    say(*evaluation_lines(evaluation), *task_lines(evaluation), *baseline_lines(evaluation))
    say(f"details: {trainer.run_dir / 'evaluation.json'}")


def report(run: Run) -> None:
    """Write report.html: curves, before and after, settings and samples in one file that needs no network."""
    from gemma_grpo.monitor.report import write_report

    say(str(write_report(run)))


def _trainer(recipe: str, overrides: list[str] | None, *, check_fit: bool = False, code: CodeFile | None = None) -> GRPOTrainer:
    """The trainer of a recipe, once the settings are known to be right: their errors must not wait for torch."""
    settings = parse_overrides(overrides or [], recipe)
    config = load_recipe(recipe, settings)
    say(update_line(config), flush=True)
    checkpoint_folder(config.model_name, weights=False)  # what the Hub refuses must not wait for torch either
    if check_fit:  # nor what does not fit; the trainer plans again, with the card that torch gives it
        plan = plan_run(config, find_shape(config.model_name), present_card())
        if not plan.fits:
            raise PreflightError(plan.refusal)

    from gemma_grpo.grpo.setup import functions_of
    from gemma_grpo.grpo.trainer import GRPOTrainer
    from gemma_grpo.monitor.terminal import ProgressView

    functions = None if code is None else functions_of(code, config)
    trainer = GRPOTrainer.from_recipe(recipe, settings, view=ProgressView(), reward_functions=functions)
    trainer.code = {} if code is None else {"code": code.record}
    return trainer


def update_line(config: GRPOConfig) -> str:
    """The product that batch_size alone does not tell."""
    return (
        f"{printable(config.model_name)}: {config.batch_size} prompts x {config.gradient_accumulation_steps} accumulation x "
        f"{config.num_generations} completions = {config.completions_per_step} completions per update"
    )


def plan_lines(plan: Mapping[str, Any]) -> list[str]:
    """What a dry run found: memory, steps, counts, rewards, and its first prompts as the model reads them."""
    lines = [str(plan["plan"]), "", f"{plan['steps']} steps", *(f"{name}: {value}" for name, value in plan["counts"].items())]
    lines.append("rewards: " + ", ".join(f"{name} x {weight:g}" for name, weight in plan["rewards"].items()))
    lines += canned_lines(plan["canned"])
    for prompt in plan["prompts"]:
        lines.append(f"prompt {printable(prompt.prompt_id)}, {len(prompt.token_ids)} tokens:")
        lines += [f"  {message['role']}: {printable(message['content'])}" for message in prompt.messages]
    return [*lines, "nothing was written"]
