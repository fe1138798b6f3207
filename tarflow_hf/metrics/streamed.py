"""The base of the `evaluate` modules here: batches are folded into mergeable statistics instead of being stored."""

from abc import ABC, abstractmethod
from functools import reduce

import torch
from numpy.typing import ArrayLike

from tarflow_hf.images.extras import installed_by
from tarflow_hf.metrics.statistics import DEFAULT_CAPACITY, FeatureStatistics, as_float64

with installed_by("eval"):
    import datasets
    import evaluate

_INDICES_PER_PROCESS = 2**40


def shown_as(description: str, inputs: str, citation: str, reference_urls: list[str]) -> evaluate.MetricInfo:
    """What `evaluate` shows of a [`StreamedMetric`]."""
    return evaluate.MetricInfo(
        description=description,
        inputs_description=inputs,
        citation=citation,
        features=datasets.Features({"predictions": datasets.Value("large_binary")}),
        reference_urls=reference_urls,
    )


class StreamedMetric(evaluate.Metric, ABC):
    """An `evaluate.Metric` whose memory and cache file do not grow with the number of examples.

    What `evaluate` stores and gathers from its processes is one row a process: the statistics of what it has seen.
    """

    capacity = DEFAULT_CAPACITY  # vectors kept beside the moments
    _statistics: FeatureStatistics | None = None
    _joined = False

    @abstractmethod
    def _info(self) -> evaluate.MetricInfo:
        """What `evaluate` shows of the metric, of [`shown_as`]."""

    def _rows(self, predictions: ArrayLike | torch.Tensor) -> ArrayLike | torch.Tensor:
        """The predictions as (batch, num_features)."""
        return predictions

    def add_batch(self, *, predictions: ArrayLike | torch.Tensor) -> None:
        """Folds a batch into the statistics."""
        self._join()
        seen = 0 if self._statistics is None else self._statistics.moments.count
        first_index = self.process_id * _INDICES_PER_PROCESS + seen
        batch = FeatureStatistics.of(self._rows(predictions), first_index, self.capacity)
        self._statistics = batch if self._statistics is None else self._statistics.merge(batch)

    def add(self, *, prediction: ArrayLike | torch.Tensor) -> None:
        """Folds one example into the statistics."""
        self.add_batch(predictions=as_float64(prediction)[None])

    def compute(
        self, *, predictions: ArrayLike | torch.Tensor | None = None, **options: object
    ) -> dict[str, float | int | str] | None:
        """The metric of everything added since the last call, on process 0; None on the others."""
        if predictions is not None:
            self.add_batch(predictions=predictions)
        self._join()
        row = b"" if self._statistics is None else self._statistics.to_bytes()
        evaluate.Metric.add_batch(self, predictions=[row])
        self._statistics, self._joined = None, False
        return evaluate.Metric.compute(self, **options)

    def _join(self) -> None:
        """Writes an empty row, by which the processes of `evaluate` meet, before the first batch."""
        if not self._joined:
            self._joined = True
            evaluate.Metric.add_batch(self, predictions=[b""])

    @staticmethod
    def merged(rows: list[bytes]) -> FeatureStatistics:
        """The statistics of all processes together, from the rows that `evaluate` gathered."""
        shards = [FeatureStatistics.from_bytes(row) for row in rows if row]
        if not shards:
            raise ValueError("predictions must hold at least one example, got none")
        return reduce(FeatureStatistics.merge, shards)


__all__ = ["StreamedMetric", "shown_as"]
