"""The linear probe: logistic regression on frozen features, its regularisation chosen on validation images alone."""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

STEPS_PER_DECADE = 8
NUM_STEPS = 97  # the grid of lambda: 1e-6 to 1e6 in 96 steps
FIRST_STRIDE = 16  # the search starts at every second power of ten and halves its stride around the peak
VALIDATION_SHARE = 0.2  # of train, where the set has no validation split
CHUNK_LOGITS = 2**22  # logits held at once
FLOAT64_BELOW = 2**24  # multiplications of one pass over the data; below, float64 costs nothing worth saving
# A fit ends when the gradient is this share of that at weights of 0, or a step gains this share of the gain expected there.
GRADIENT_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
GAIN_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-7}


class ProbeWeights(NamedTuple):
    """A linear classifier. Legend: D features, C classes."""

    weight: Tensor  # (C, D) float64
    bias: Tensor  # (C,) float64, -inf for a class without training images
    num_iterations: int
    converged: bool  # False: max_iterations ended the fit

    def logits(self, features: Tensor) -> Tensor:
        """Score features (N, D). (N, C), float64."""
        return features.double() @ self.weight.T + self.bias


@dataclass(frozen=True)
class LinearProbe:
    """A probe and its test."""

    accuracy: float
    n: int  # test images
    guesses: Tensor  # (N,) int64
    logits: Tensor  # (N, C) float64; softmax gives the probabilities
    regularisation: float  # lambda that was chosen; scikit-learn's C is 1 / lambda
    curve: tuple[tuple[float, float], ...]  # (lambda, accuracy on validation) of each tried lambda, rising
    num_validation: int
    weights: ProbeWeights


def linear_probe(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], *, num_classes: int,
                 validation: tuple[Tensor, Tensor] | None = None, max_iterations: int = 1000) -> LinearProbe:
    """Fit a linear classifier on features and measure it.

    Lambda is searched on a grid of 8 values a decade from 1e-6 to 1e6: first every second power of ten, then with half
    the distance around the best, four times. The last fit is on train and validation together.

    Args:
      train: features (N, D) and labels (N,) int64.
      test: the same; looked at once, at the end.
      num_classes: C; labels are 0 to C - 1.
      validation: the same as train; None = a stratified fifth of train. Which images that takes depends on the labels
        alone: two models are measured with the same.
      max_iterations: L-BFGS steps of one fit.

    Raises:
      ValueError: a feature is not finite, shapes do not fit, a label is outside the classes, or train has one class.

    Source: Radford et al. 2021, appendix A.3.
    """
    check_images("test", *test, num_classes)
    if validation is None:
        check_images("train", *train, num_classes)
        kept, taken = stratified_split(train[1], VALIDATION_SHARE)
        fitted, validation = (train[0][kept], train[1][kept]), (train[0][taken], train[1][taken])
    else:
        fitted = train
    best, curve, start = search_regularisation(fitted, validation, num_classes=num_classes, max_iterations=max_iterations)
    features, labels = (torch.cat([a, b]) for a, b in zip(fitted, validation, strict=True))
    weights = ProbeProblem(features, labels, num_classes).fit(best, start=start, max_iterations=max_iterations)
    logits = weights.logits(test[0])  # (N, C)
    guesses = logits.argmax(dim=1)  # (N,)
    return LinearProbe((guesses == test[1]).double().mean().item(), len(guesses), guesses, logits, best, curve,
                       len(validation[1]), weights)


def search_regularisation(train: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor], *, num_classes: int,
                          max_iterations: int = 1000) -> tuple[float, tuple[tuple[float, float], ...], ProbeWeights]:
    """Find the lambda with the best accuracy on validation; of equals the strongest. Arguments as in `linear_probe`.

    Returns:
      The lambda, the (lambda, accuracy) of each that was tried, rising, and the weights fitted on train with the best.
    """
    check_images("validation", *validation, num_classes)
    problem = ProbeProblem(*train, num_classes)
    fits: dict[int, ProbeWeights] = {}
    accuracy: dict[int, float] = {}

    def try_step(step: int) -> None:
        stronger = min((other for other in fits if other > step), default=None)
        fits[step] = problem.fit(regularisation_at(step), start=None if stronger is None else fits[stronger],
                                 max_iterations=max_iterations)
        guesses = fits[step].logits(validation[0]).argmax(dim=1)
        accuracy[step] = (guesses == validation[1]).double().mean().item()

    for step in reversed(range(0, NUM_STEPS, FIRST_STRIDE)):  # each fit starts at the next stronger one's solution
        try_step(step)
    stride = FIRST_STRIDE // 2
    while stride:
        peak = max(fits, key=lambda step: (accuracy[step], step))
        for step in (peak + stride, peak - stride):
            if 0 <= step < NUM_STEPS and step not in fits:
                try_step(step)
        stride //= 2
    peak = max(fits, key=lambda step: (accuracy[step], step))
    return regularisation_at(peak), tuple((regularisation_at(step), accuracy[step]) for step in sorted(fits)), fits[peak]


def regularisation_at(step: int) -> float:
    """Lambda at a step of the grid, 0 to 96."""
    return 10.0 ** ((step - NUM_STEPS // 2) / STEPS_PER_DECADE)


def stratified_split(labels: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Split images by class, at random but always the same for the same labels (N,).

    Returns:
      Indices of the images that stay, and of those taken: of each class the share, rounded, but never its last image.
    """
    order_of = labels.cpu().to(torch.int64).numpy()
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(order_of.tobytes()).digest()[:8], "little"))
    taken = np.zeros(len(labels), bool)
    for number in np.unique(order_of):
        images = rng.permutation(np.flatnonzero(order_of == number))
        taken[images[:min(round(share * len(images)), len(images) - 1)]] = True
    return torch.from_numpy(np.flatnonzero(~taken)), torch.from_numpy(np.flatnonzero(taken))


class ProbeProblem:
    """Logistic regression on given images, prepared once for many lambdas.

    The features are centred and rotated to their principal axes, and a fit works in coordinates in which each axis is
    about equally curved. None of it moves the solution (the bias has no penalty, and rotations keep the norm), but
    L-BFGS then needs a fraction of the steps.
    """

    def __init__(self, features: Tensor, labels: Tensor, num_classes: int) -> None:
        check_images("train", features, labels, num_classes)
        self.num_classes = num_classes
        self.present, self.labels = labels.unique(return_inverse=True)  # (C present,), (N,)
        if len(self.present) < 2:
            raise ValueError(f"train has images of {len(self.present)} class; a probe needs at least 2")
        few = features.shape[0] * features.shape[1] * len(self.present) < FLOAT64_BELOW
        self.dtype = torch.float64 if few else torch.float32
        self.mean = features.mean(dim=0, dtype=torch.float64)  # (D,)
        centred = features.double() - self.mean  # (N, D)
        if len(features) < features.shape[1]:
            _, singular, axes = torch.linalg.svd(centred, full_matrices=False)
            spectrum, axes = singular.square() / len(features), axes.T  # (N,), (D, N)
        else:
            spectrum, axes = torch.linalg.eigh(centred.T @ centred / len(features))  # (D,), (D, D)
        # Along an axis without variance the penalty holds the weight at 0; the threshold is rounding.
        used = spectrum > 1e-14 * features.double().square().sum(dim=1).mean()
        self.spectrum, self.axes = spectrum[used], axes[:, used]  # (A,), (D, A)
        self.rotated = (centred @ self.axes).to(self.dtype)  # (N, A)
        # Where the weights are 0, the best bias is the logarithm of the class's share.
        self.first_bias = (torch.bincount(self.labels).double() / len(labels)).log()  # (C present,)
        self.first_loss, self.first_gradient = self._loss(self.spectrum.new_zeros(len(self.spectrum), len(self.present)),
                                                          self.first_bias, self.dtype)  # scalar, (A + 1, C)

    def fit(self, regularisation: float, *, start: ProbeWeights | None = None, max_iterations: int = 1000) -> ProbeWeights:
        """Minimise sum of cross-entropies + lambda / 2 * |weight|^2, scikit-learn's objective at C = 1 / lambda.

        Args:
          regularisation: lambda > 0.
          start: where to begin; None = at 0.
          max_iterations: of L-BFGS.
        """
        from scipy.optimize import minimize

        n, num_present = len(self.labels), len(self.present)
        # scikit-learn gives two classes one weight vector, w; the softmax has w/2 and -w/2, whose norms add to half.
        penalty = regularisation / n * (2 if num_present == 2 else 1)
        curvature = 1 / num_present  # of the mean loss, about: p (1 - p) of a class
        scale = torch.cat([(curvature * self.spectrum + penalty).rsqrt(), self.spectrum.new_tensor([curvature**-0.5])])
        # Where the penalty rules, all that is gained is smaller than the rounding of single precision, and steps are few.
        dtype = torch.float64 if (curvature * self.spectrum < penalty).all() else self.dtype
        slope = scale[:, None] * self.first_gradient
        gain = max(slope.square().sum().item() / 2, 1e-12)  # of one Newton step; far less than rounding if it is the bound

        def objective(point: np.ndarray) -> tuple[float, np.ndarray]:
            solution = scale[:, None] * torch.from_numpy(point).to(scale).view(-1, num_present)  # (A + 1, C)
            loss, gradient = self._loss(solution[:-1], solution[-1], dtype)
            loss += penalty / 2 * solution[:-1].square().sum() - self.first_loss
            gradient[:-1] += penalty * solution[:-1]
            return loss.item() / gain, (scale[:, None] * gradient / gain).flatten().cpu().numpy()

        begin = self._coordinates(start) / scale[:, None]  # (A + 1, C)
        found = minimize(objective, begin.flatten().cpu().numpy(), jac=True, method="L-BFGS-B", options={
            "maxiter": max_iterations, "maxfun": 4 * max_iterations, "maxcor": 20,
            "gtol": GRADIENT_TOLERANCE[self.dtype] * slope.abs().max().item() / gain, "ftol": GAIN_TOLERANCE[self.dtype]})
        return self._weights(scale[:, None] * torch.from_numpy(found.x).to(scale).view(-1, num_present), int(found.nit),
                             found.nit < max_iterations)

    def _coordinates(self, start: ProbeWeights | None) -> Tensor:
        """Weights and bias of the present classes along the axes, (A + 1, C)."""
        if start is None:
            return torch.cat([torch.zeros_like(self.first_gradient[:-1]), self.first_bias[None]])
        weight, bias = start.weight[self.present], start.bias[self.present]  # (C, D), (C,)
        bias = bias.nan_to_num(neginf=0.0)  # a class that the start had no image of
        return torch.cat([self.axes.T @ weight.T, (bias + weight @ self.mean)[None]])

    def _weights(self, solution: Tensor, num_iterations: int, converged: bool) -> ProbeWeights:
        """Back from the axes: solution (A + 1, C)."""
        weight = solution.new_zeros(self.num_classes, len(self.mean))
        bias = solution.new_full((self.num_classes,), -torch.inf)
        weight[self.present] = (self.axes @ solution[:-1]).T
        present_bias = solution[-1] - weight[self.present] @ self.mean
        bias[self.present] = present_bias - present_bias.mean()  # the softmax leaves it open; so does scikit-learn
        return ProbeWeights(weight, bias, num_iterations, converged)

    def _loss(self, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of weight (A, C) and bias (C,), and its gradient (A + 1, C), float64; worked out in dtype."""
        loss = weight.new_zeros(())
        gradient = weight.new_zeros(len(weight) + 1, len(bias))
        rows = max(1, CHUNK_LOGITS // len(bias))
        for features, labels in zip(self.rotated.split(rows), self.labels.split(rows), strict=True):
            features = features.to(dtype)  # (rows, A)
            scores = torch.addmm(bias.to(dtype), features, weight.to(dtype)).log_softmax(dim=1)  # (rows, C)
            right = labels[:, None]
            loss -= scores.gather(1, right).sum(dtype=torch.float64)
            residuals = scores.exp_()
            residuals.scatter_add_(1, right, residuals.new_full(right.shape, -1))
            gradient[:-1] += features.T @ residuals
            gradient[-1] += residuals.sum(dim=0)
        return loss / len(self.labels), gradient / len(self.labels)


def check_images(name: str, features: Tensor, labels: Tensor, num_classes: int) -> None:
    """Raise a ValueError where labelled features cannot be used: features (N, D), labels (N,)."""
    if features.ndim != 2 or len(features) != len(labels) or len(labels) == 0:
        raise ValueError(f"{name} has features {tuple(features.shape)} and {len(labels)} labels; give at least one row of "
                         "features, and a label for each")
    if not features.isfinite().all():
        raise ValueError(f"{name} features hold NaN or infinity; the model cannot be measured: look at its weights and inputs")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"{name} labels go from {int(labels.min())} to {int(labels.max())}; with {num_classes} classes they "
                         f"must lie in 0 to {num_classes - 1}")
