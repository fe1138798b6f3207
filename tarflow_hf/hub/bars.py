"""The libraries' progress bars, which have no place in the log file of a job."""

import sys

_SWITCHES = {
    "transformers.utils.logging": "disable_progress_bar",
    "diffusers.utils.logging": "disable_progress_bar",
    "datasets": "disable_progress_bars",
}


def no_bars_off_a_terminal() -> None:
    """Where stderr is no terminal, switches off the progress bars of transformers, diffusers and datasets.

    For programs, not for libraries: it holds for the whole process. Those that are imported later keep their bars.

    Example:
        >>> no_bars_off_a_terminal()
    """
    if sys.stderr.isatty():
        return
    for module, switch in _SWITCHES.items():
        if module in sys.modules:
            getattr(sys.modules[module], switch)()


__all__ = ["no_bars_off_a_terminal"]
