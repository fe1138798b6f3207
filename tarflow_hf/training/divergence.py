"""What to do about a run that diverged."""

from tarflow_hf.training.arguments import OptimizationArguments


def advice(settings: OptimizationArguments, step: int | None, rollbacks: int) -> str:
    """How to go on, in options that are obeyed.

    Args:
        settings: The options that it diverged with.
        step: Of the last sound checkpoint; None if there is none.
        rollbacks: How often the run went back already.

    Example:
        >>> from tarflow_hf.training.arguments import OptimizationArguments
        >>> settings = OptimizationArguments(max_steps=100, max_grad_norm=1.0)
        >>> print(advice(settings, None, 0))
        There is no checkpoint of before: start anew in another output_dir, with --learning_rate 5e-05
        >>> print(advice(settings, 40, 3))
        The run went back 3 times (max_rollbacks=3). Its last sound checkpoint, of step 40, is the newest one now: ...
    """
    changes = [f"learning_rate={settings.learning_rate / 2:g}"]
    if settings.max_grad_norm is None:
        changes.append("max_grad_norm=1.0")
    if settings.precision != "float32":
        changes.append("precision=float32")
    if step is None:
        options = " or ".join(f"--{change.replace('=', ' ')}" for change in changes)
        return f"There is no checkpoint of before: start anew in another output_dir, with {options}"
    options = " or ".join(f"--override {change}" for change in changes)
    return (
        f"The run went back {rollbacks} times (max_rollbacks={settings.max_rollbacks}). Its last sound checkpoint, of "
        f"step {step}, is the newest one now: start the same command with {options}"
    )


__all__ = ["advice"]
