"""Which losses a step adds up, with which weights and divisors: the student's outputs and its targets -> named terms."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from training.engine.distributed import Ranks
from training.methods import augment, losses
from training.methods.losses import Loss
from training.methods.registry import Method
from training.methods.selection import Labels, Targets
from training.methods.student import Outputs

LABELLED_TERMS = ("supervised", "supervised_corr")


def stream_name(i: int) -> str:
    """The name of the i-th strong view's term."""
    return "unsupervised" if i == 0 else f"unsupervised_{i + 1}"


@dataclass(frozen=True)
class StepLoss:
    """The loss terms of one step, each named as in `Method.weights`; a term without a weight is not computed.

    ignore: class id of labelled pixels that do not count. unsup_weight: factor of the unlabelled terms at this step.
    """

    method: Method
    ignore: int
    unsup_weight: float
    ranks: Ranks

    @property
    def weights(self) -> dict[str, float]:
        """The weights at this step of the terms that have one."""
        factors = {name: 1.0 if name in LABELLED_TERMS else self.unsup_weight for name in self.method.weights}
        return {name: weight * factors[name] for name, weight in self.method.weights.items() if weight}

    def counts(self, label_BHW: Tensor, targets: Targets) -> dict[str, Tensor]:
        """What divides each term, over all micro-batches and, by one sum, over all ranks."""
        views: dict[str, Labels] = {stream_name(i): target for i, target in enumerate(targets.strong)}
        if targets.weak is not None:
            first, weak = targets.strong[0], targets.weak
            views |= {"corr_strong": first, "divergence": first, "perturbed": weak, "corr_weak": weak}
        views = {name: view for name, view in views.items() if self.method.weights.get(name)}

        masks = [label_BHW != self.ignore, *(m for view in views.values() for m in (view.keep_BHW, view.valid_BHW))]
        known, *pairs = self.ranks.add(torch.stack([mask.sum() for mask in masks])).unbind()

        counts = dict.fromkeys(LABELLED_TERMS, known)
        for name, kept, valid in zip(views, pairs[::2], pairs[1::2], strict=True):
            counts[name] = valid if name == "divergence" else losses.divisor(kept, valid, self.method.normaliser)
        return counts

    def terms(
        self,
        out: Outputs,
        label_BHW: Tensor,
        targets: Targets,
        counts: dict[str, Tensor],
        weight_BHW: Tensor | None = None,
    ) -> dict[str, Loss]:
        """The terms of one batch or micro-batch. counts: from `counts`, over all micro-batches.

        weight_BHW: what each labelled pixel counts; None: 1.
        """
        logits = {"supervised": out.labelled}
        if out.corr is not None:
            logits["supervised_corr"] = out.corr[0]
        pairs: list[tuple[str, Tensor, Labels]] = [
            (stream_name(i), out.strong[i], target) for i, target in enumerate(targets.strong)
        ]
        if targets.weak is not None and out.perturbed is not None:
            pairs.append(("perturbed", out.perturbed, targets.weak))
        if targets.weak is not None and out.corr is not None:
            pairs += [("corr_strong", out.corr[2][0], targets.strong[0]), ("corr_weak", out.corr[1], targets.weak)]

        weights = self.weights
        terms = {
            name: self._supervised(name, value, label_BHW, counts, weight_BHW)
            for name, value in logits.items()
            if name in weights
        }
        terms |= {name: self._masked(name, value, view, counts) for name, value, view in pairs if name in weights}
        if targets.weak is not None and out.corr is not None and "divergence" in weights:
            terms["divergence"] = self._divergence(out, targets, counts)
        return terms

    def _supervised(
        self,
        name: str,
        logits_BKHW: Tensor,
        label_BHW: Tensor,
        counts: dict[str, Tensor],
        weight_BHW: Tensor | None,
    ) -> Loss:
        method, weight = self.method, self.weights[name]
        if method.hard:
            return losses.hard(
                logits_BKHW, label_BHW, self.ignore, weight, sure=method.sure, least=method.hard, add=self.ranks.add,
                weight_BHW=weight_BHW,
            )  # fmt: skip
        return losses.supervised(logits_BKHW, label_BHW, self.ignore, weight, count=counts[name], weight_BHW=weight_BHW)

    def _masked(self, name: str, logits_BKHW: Tensor, view: Labels, counts: dict[str, Tensor]) -> Loss:
        return losses.masked(
            logits_BKHW, view.label_BHW, view.keep_BHW, view.valid_BHW, self.method.normaliser, self.weights[name],
            count=counts[name], weight_BHW=view.weight_BHW,
        )  # fmt: skip

    def _divergence(self, out: Outputs, targets: Targets, counts: dict[str, Tensor]) -> Loss:
        assert self.method.correlation is not None
        first = targets.strong[0]
        soft_BKHW = out.weak.detach().float().softmax(1)
        if self.method.correlation.mixed_target:
            soft_BKHW = augment.mix(soft_BKHW, first.box_BHW)
        return losses.divergence(
            out.strong[0], soft_BKHW, first.sure_BHW, first.valid_BHW, self.weights["divergence"],
            count=counts["divergence"], weight_BHW=first.weight_BHW,
        )  # fmt: skip

    def total(self, terms: dict[str, Loss]) -> Tensor:
        """The weighted sum. Counts are over all ranks and gradients are averaged over them, hence the factor."""
        return self.ranks.world * torch.stack([term.weight * term.mean() for term in terms.values()]).sum()

    def over_ranks(self, terms: dict[str, Loss]) -> dict[str, Loss]:
        """The terms of all ranks together, detached."""
        totals = self.ranks.add(torch.stack([term.total.detach() for term in terms.values()]))
        return {name: replace(terms[name], total=total) for name, total in zip(terms, totals, strict=True)}
