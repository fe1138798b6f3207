"""Uploads the pipelines of a training run while it goes on."""

import logging
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import CommitInfo

from tarflow_hf.hub.push import push_folder

logger = logging.getLogger(__name__)


class BackgroundPush:
    """Uploads one pipeline at a time in a thread of its own; while one is under way, further ones are left out.

    Args:
        repo_id: "user/model"; made if missing.
        private: Whether a repository that is made now is private.
        revision: Branch to commit to; None for main.

    Example:
        >>> uploads = BackgroundPush("user/model")
        >>> for step in range(3):
        ...     uploads.start(pipe.save_pretrained, f"Step {step}")  # doctest: +SKIP
        >>> uploads.wait()
    """

    def __init__(self, repo_id: str, *, private: bool | None = None, revision: str | None = None) -> None:
        self.repo_id = repo_id
        self.private = private
        self.revision = revision
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="push")
        self._upload: Future[CommitInfo] | None = None

    def start(self, save: Callable[[Path], object], message: str) -> bool:
        """Saves a pipeline and begins to upload it.

        Args:
            save: Writes the pipeline, and what goes with it, into the folder it is given; done before this returns.
            message: Title of the commit.

        Returns:
            Whether it was begun; False while the former upload is under way.
        """
        if self._upload is not None and not self._upload.done():
            return False
        self.wait()
        folder = tempfile.TemporaryDirectory()
        save(Path(folder.name))
        self._upload = self._executor.submit(self._push, folder, message)
        return True

    def wait(self) -> CommitInfo | None:
        """Waits for the upload that is under way. One that failed is logged as a warning: the next one may succeed.

        Returns:
            Its commit, or None if it failed or there was none since the last call.
        """
        upload, self._upload = self._upload, None
        if upload is None:
            return None
        if (error := upload.exception()) is not None:
            logger.warning("an upload to %s failed: %s", self.repo_id, error)
            return None
        return upload.result()

    def _push(self, folder: tempfile.TemporaryDirectory[str], message: str) -> CommitInfo:
        with folder:
            return push_folder(
                folder.name, self.repo_id, commit_message=message, private=self.private, revision=self.revision
            )


__all__ = ["BackgroundPush"]
