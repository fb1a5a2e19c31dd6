"""Runs a model over a target corpus and its distractors, and fills a `NeuronStats`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunekit import ops
from prunekit.arch import (
    MLPView,
    check_finite,
    decoder_of,
    find_mlps,
    fingerprint,
    input_device,
)
from prunekit.batching import Batch, Tokens, batches, encode
from prunekit.corpus import Corpus, as_corpus
from prunekit.course import Course
from prunekit.errors import InputError
from prunekit.files import digest
from prunekit.gradients import add_gradients, check_gradients, output_squares
from prunekit.observe import observed
from prunekit.ops.activations import ACTIVATIONS
from prunekit.ops.quick import quick_products
from prunekit.progress import progress_bar
from prunekit.ranks import share
from prunekit.stats import NeuronStats, NeuronSums
from prunekit.unfinished import Unfinished

logger = logging.getLogger(__name__)

Source = str | Path | Corpus | Sequence[str]


class Recorder:
    """The taps of a calibration: compute h, and add its statistics to the current class.

    Where it runs backwards, a batch counts once, from `begin` on: layers may run again for that.

    Args:
        views: the MLPs.
        sums: theirs of the current class.
    """

    def __init__(self, views: list[MLPView], sums: Sequence[NeuronSums] = ()):
        self.views, self.sums = views, sums
        self.batch_spans = torch.zeros(0, 2, dtype=torch.int64)
        self.awaited: set[int] = set()  # MLPs that this batch has not reached yet

    def begin(self, batch: Batch) -> None:
        """The next forward is of this batch."""
        self.batch_spans = batch.spans()
        self.awaited = set(range(len(self.views)))

    def __call__(
        self,
        index: int,
        gate: torch.Tensor,
        up: torch.Tensor | None,
        rows: torch.Tensor | None,
    ) -> torch.Tensor:
        spans = self.batch_spans
        if rows is not None:  # an expert sees some of the tokens: find each prompt's among them
            spans = torch.searchsorted(rows.cpu(), spans)
        h, prompt_stats, token_stats = ops.gated_act_stats(gate, up, spans, self.views[index].act)
        self._add(index, h, prompt_stats, token_stats, spans)
        return h

    def mlp(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """The tap of a whole MLP, where products and statistics are one operation."""
        v, spans = self.views[index], self.batch_spans
        biases = {"gate_bias": v.gate_bias, "up_bias": v.up_bias, "down_bias": v.down_bias}
        y, *found = ops.gated_mlp_stats(x, v.gate, v.up, v.down, spans, **biases, act=v.act)
        self._add(index, *found, spans)
        return y

    def differentiable(self, index: int, gate, up, rows) -> torch.Tensor:
        """The tap of a forward that runs backwards: its h is torch's, beside the statistics'."""
        if index in self.awaited:
            self.awaited.remove(index)
            with torch.no_grad():
                self(index, gate.detach(), None if up is None else up.detach(), rows)
        h = ACTIVATIONS[self.views[index].act](gate)
        return h if up is None else h * up

    def _add(self, index: int, h, prompt_stats, token_stats, spans: torch.Tensor) -> None:
        sums = self.sums[index]
        sums.add(prompt_stats, token_stats, (spans[:, 1] - spans[:, 0]).tolist())
        if sums.gram is not None:
            ops.gram_update(sums.gram, _counted(h, spans))


def _counted(h: torch.Tensor, spans: torch.Tensor) -> torch.Tensor:
    """The rows of h that belong to prompts: h itself where there is no padding."""
    if int((spans[:, 1] - spans[:, 0]).sum()) == h.shape[0]:
        return h
    return torch.cat([h[start:end] for start, end in spans.tolist()])


@torch.inference_mode()
def forward_decoder(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Run the decoder without its lm_head: [B, S, D].

    Padding lies on the right and attention is causal, so no token sees it and no mask is needed.
    """
    return decoder_of(model)(input_ids=batch.ids.to(input_device(model)), use_cache=False)[0]


@quick_products()
def calibrate(
    model: nn.Module,
    tokenizer: Any,
    target: Source,
    distractors: Sequence[Source] = (),
    *,
    gram: bool = False,
    gradients: bool = False,
    taylor: bool = False,
    off_task: bool = False,
    max_length: int = 1024,
    batch_tokens: int = 2048,
    unfinished: str | Path | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> NeuronStats:
    """Gather the statistics that every criterion, strategy and sparsity is computed from.

    In the processes of `prunekit.ranks.meeting` each runs its share of the batches, which are those
    of one process, and all return the same.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        target: the corpus of the task to keep: a JSONL or CSV file, ``hf:NAME``, texts, a Corpus.
        distractors: corpora to contrast it with, taken together as one class.
        gram: also accumulate the target's Gram matrices, 4·F² bytes an MLP, and keep its prompts'
            token ids; lstsq needs the former, sequential both.
        gradients: also run the target backwards, for criteria and repairs that weigh errors by
            their effect on the loss; 4·D² bytes an MLP, and with gram 4 bytes a token more.
        taylor: with the gradients of the weights too, for the criterion of that name.
        off_task: gather all this of the distractors too, so that `contrast.weigh` can keep a share
            of what they need.
        max_length: tokens of a prompt that are read.
        batch_tokens: tokens of a batch, padding included; where gradients are gathered, 1024.
        unfinished: a file to keep what was done in, every five minutes and when Ctrl-C or SIGTERM
            comes, after the batch under way; of one process. It stays: remove it when the
            statistics are saved. As large as these.
        resume: go on from there, to the same statistics, bit by bit; from the beginning where
            there is no such file.
        quiet: no progress bar.

    Returns:
        NeuronStats on the CPU.

    Raises:
        InputError: a corpus cannot be read or is empty, the model's MLPs are unknown, or it gives
            NaN or Inf (the MLP and neuron are named); ``unfinished`` is of another calibration.
        Stopped: a signal came, and what was done is kept.

    Cost:
        One forward of the decoder over all tokens, without the lm_head; with gram, T·F² FLOP more.
        With gradients the target's forward is also run backwards (`gradients.add_gradients`).
        With off_task, all that for the distractors too.

    Source:
        The statistics of arXiv 2604.27115 and of the criteria in `prunekit.criteria`.
    """
    check_sizes(max_length, batch_tokens)
    views = find_mlps(model, verify=False)
    check_finite(model, views)
    views = find_mlps(model)
    for view in views:
        if view.kind == "experts" and view.gate.is_meta:
            raise InputError(f"{view.name}: offloaded experts cannot be observed; load them whole")
    read = encoded(target, distractors, tokenizer, max_length)
    prompts = read.prompts
    whole = [name for name in prompts if off_task or name == "target"]  # all is gathered of these
    replayed = {name: prompts[name] for name in whole if gram}
    provenance = read.provenance(model, views)
    names, print_ = [v.name for v in views], fingerprint(views)
    asked = [provenance, gram, gradients, taylor, off_task, batch_tokens]
    if unfinished is not None:
        asked += [v.gate.sum(dtype=torch.float64).item() for v in views if v.readable]
    work = Unfinished(names, print_, asked, replayed, unfinished, resume=resume)
    backwards = whole if gradients or taylor else []
    for name in backwards:
        work.squares.setdefault(name, output_squares(views, prompts[name]))
    recorder = Recorder(views)
    was_training = model.training
    model.eval()
    try:
        through = list(work.classes)[:-1]
        for name in [name for name in prompts if name not in through]:
            recorder.sums, course = _begun(work, views, name, gram and name in whole)
            label = f"calibrate {name}"
            if name in backwards:
                options = {"taylor": taylor, "course": course, "squares": work.squares[name]}
                _run_backwards(model, prompts[name], recorder, options, label, quiet)
            else:
                _run(model, prompts[name], recorder, batch_tokens, course, label, quiet)
            for sums in recorder.sums:
                sums.add_up_ranks()
            check_sums(views, name, recorder.sums)
            if name in backwards:
                check_gradients(views, recorder.sums)
            for sums in recorder.sums:
                sums.finish()
    finally:
        model.train(was_training)
    found = {name: work.squares.get(name) for name in replayed}
    return NeuronStats(
        names,
        work.classes,
        print_,
        provenance,
        replayed.get("target"),
        found.get("target"),
        replayed.get("distractor"),
        found.get("distractor"),
    )


def check_sizes(max_length: int, batch_tokens: int) -> None:
    """Raise InputError unless prompts and batches may have a token."""
    if max_length < 1 or batch_tokens < 1:
        raise InputError("max_length and batch_tokens: must be at least 1")


@dataclass(frozen=True)
class Encoded:
    """The corpora of a calibration as tokens.

    Attributes:
        prompts: each class's.
        record: what the provenance says of its corpora.
        max_length: tokens of a prompt that were read.
    """

    prompts: dict[str, list[Tokens]]
    record: list[dict[str, Any]]
    max_length: int

    def provenance(self, model: nn.Module, views: list[MLPView]) -> dict[str, Any]:
        """What statistics of a model over these say of where they come from."""
        return {
            "model": getattr(model.config, "_name_or_path", ""),
            "config": digest(model.config.to_dict()),
            "dtype": str(views[0].gate.dtype).removeprefix("torch."),
            "max_length": self.max_length,
            "corpora": self.record,
        }


def encoded(
    target: Source, distractors: Sequence[Source], tokenizer: Any, max_length: int
) -> Encoded:
    """Read and tokenise a target and its distractors, which are one class together.

    Raises:
        InputError: a corpus cannot be read, or no prompt of it has a token.
    """
    corpora = {"target": [as_corpus(target, tokenizer)]}
    if distractors:
        corpora["distractor"] = [as_corpus(source, tokenizer) for source in distractors]
    prompts: dict[str, list[Tokens]] = {}
    record = []
    for name, members in corpora.items():
        prompts[name] = []
        for corpus in members:
            found = encode(corpus, tokenizer, max_length)
            if not found:
                raise InputError(f"{corpus.name}: no prompt has a token")
            prompts[name] += found
            record.append(
                {
                    "class": name,
                    "name": corpus.name,
                    "hash": corpus.hash,
                    "prompts": len(found),
                    "tokens": sum(len(p.ids) for p in found),
                }
            )
    return Encoded(prompts, record, max_length)


def _begun(
    work: Unfinished, views: list[MLPView], name: str, gram: bool
) -> tuple[list[NeuronSums], Course]:
    """A class's sums and the course over its batches: from the start, or from where it stopped."""
    done = work.done if name in work.classes else 0
    if name in work.classes:
        for view, sums in zip(views, work.classes[name], strict=True):
            sums.to(view.device)
    else:
        work.classes[name] = [NeuronSums.zeros(v.width, v.device, gram=gram) for v in views]
    return work.classes[name], Course(done, work.keep if work.keeps else None)


def _run(
    model, prompts, recorder: Recorder, batch_tokens: int, course: Course, label: str, quiet: bool
) -> None:
    groups = share(list(batches(prompts, batch_tokens)))
    total = sum(batch.tokens for batch in groups)
    taps = observed(recorder.views, recorder, recorder.mlp)
    with taps, progress_bar(total, label, "tok", quiet=quiet) as bar:
        bar.update(sum(batch.tokens for batch in groups[: course.done]))
        for batch in course.over(groups):
            recorder.begin(batch)
            forward_decoder(model, batch)
            bar.update(batch.tokens)


def _run_backwards(model, prompts, recorder: Recorder, options: dict, label, quiet) -> None:
    options |= {"begin": recorder.begin, "label": label, "quiet": quiet}
    with observed(recorder.views, recorder.differentiable):
        add_gradients(model, recorder.views, prompts, recorder.sums, **options)


def check_sums(views: list[MLPView], name: str, many: list[NeuronSums]) -> None:
    """Raise InputError where a class of corpora gave NaN or Inf, naming the MLP and neuron."""
    for view, sums in zip(views, many, strict=True):
        bad = ~torch.isfinite(sums.token_square_sum)
        if bad.any():
            neuron = int(bad.nonzero()[0])
            raise InputError(
                f"{view.name}: neuron {neuron} gave NaN or Inf on the {name} corpus "
                f"({int(bad.sum())} of {view.width} neurons did); check the weights or use bf16"
            )
