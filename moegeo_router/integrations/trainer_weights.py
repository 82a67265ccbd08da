"""Checkpoints of stacked experts, which the ``Trainer`` of transformers writes and does not read.

``save_pretrained`` writes one matrix an expert, the model has one tensor for all, and the Trainer loads without the
conversion that ``from_pretrained`` makes: a run that is resumed goes on with the experts that the model happened to
have, and only a line of the log says so (transformers 5.23, issue 48805).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import Trainer


class WholeCheckpoints:
    """Loads what the Trainer leaves out of a checkpoint that is in another layout than the model.

    Args:
        trainer: that loads.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._folder = trainer, ""

    def around(self) -> dict[str, Callable[..., Any]]:
        """Return what is called with the trainer's methods of these names, in their place."""
        return {
            "_load_from_checkpoint": self._resume,
            "_load_best_model": self._best,
            "_issue_warnings_after_load": self._check,
        }

    def _resume(self, load: Callable[..., None], resume_from_checkpoint: str, model: Any = None) -> None:
        self._folder = resume_from_checkpoint
        load(resume_from_checkpoint, model)

    def _best(self, load: Callable[[], None]) -> None:
        self._folder = str(self._trainer.state.best_model_checkpoint)
        load()

    def _check(self, issue: Callable[[Any], None], load_result: Any) -> None:
        """Load the checkpoint anew if it has weights that the model does not know, and lacks some of the model's.

        Raises:
            ValueError: it lacks them in any layout.
        """
        missing = load_result.missing_keys
        if not missing or not load_result.unexpected_keys or not hasattr(self._trainer.model, "from_pretrained"):
            issue(load_result)
            return
        model: Any = self._trainer.model
        loaded, found = type(model).from_pretrained(Path(self._folder), dtype="auto", output_loading_info=True)
        if lacking := sorted(found["missing_keys"]):
            raise ValueError(f"checkpoint {self._folder} lacks weights of the model: {', '.join(lacking)}")
        model.load_state_dict(loaded.state_dict())
        if self._trainer.args.process_index == 0:
            warnings.warn(
                f"the Trainer left {len(missing)} weights out ({missing[0]}, ...) that {self._folder} has in another "
                "layout (transformers issue 48805): they are loaded from it, too",
                stacklevel=2,
            )
