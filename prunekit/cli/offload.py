"""`--offload disk`: a calibration of a model that memory does not hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from prunekit.calibrate import Encoded, check_sizes, encoded
from prunekit.checkpoint.offloaded import Offloaded
from prunekit.checkpoint.stream import Checkpoint
from prunekit.cli.output import Output, megabytes
from prunekit.cli.sources import corpora, joined
from prunekit.config import CalibrateConfig, PruneConfig
from prunekit.files import working_folder
from prunekit.integrations.loading import load_shape, load_tokenizer, weights_folder
from prunekit.layerwise import calibrate_layerwise
from prunekit.stats import NeuronStats


@contextmanager
def calibrated_on_disk(
    config: CalibrateConfig | PruneConfig, output: Output, **wanted: bool
) -> Iterator[NeuronStats]:
    """Inside, statistics whose matrices lie in a folder beside what the config writes.

    Args:
        wanted: gram, gradients, taylor and off_task, as for `calibrate`.
    """
    with working_folder(config.output) as place:
        yield _calibrated(config, output, place, wanted)


def _calibrated(
    config: CalibrateConfig | PruneConfig, output: Output, place: Path, wanted: dict[str, bool]
) -> NeuronStats:
    check_sizes(config.max_length, config.batch_tokens)
    folder = weights_folder(config.model)
    shape = load_shape(config.model, dtype=config.dtype, buffers=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Offloaded(Checkpoint(folder, shape), device)
    read = _encoded(config)
    if not config.quiet:
        output.note(
            f"offload: of the weights one of {len(model.layers)} layers is in memory at a time "
            f"({megabytes(model.layer_bytes())}), or embeddings and head "
            f"({megabytes(model.ends_bytes())})"
        )
    options = {"batch_tokens": config.batch_tokens, "quiet": config.quiet}
    return calibrate_layerwise(model, read, folder=place, **options, **wanted)


def _encoded(config: CalibrateConfig | PruneConfig) -> Encoded:
    tokenizer = load_tokenizer(config.model)
    target = joined(corpora(config.target, tokenizer, config.limit))
    distractors = corpora(config.distractor, tokenizer, config.limit)
    return encoded(target, distractors, tokenizer, config.max_length)
