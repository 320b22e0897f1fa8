"""Find concept directions: labelled rows, or an SAE's latent, in; a Direction out."""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.acts.direction import Direction, as_rows, data_fingerprint, direction_from
from interp.acts.resampling import Labels, as_labels

__all__ = ["METHODS", "fit_direction", "latent_direction", "mean_difference"]

Rows: TypeAlias = Float[Tensor, "n d"] | Float[np.ndarray, "n d"]


def mean_difference(X: Rows, y: Labels) -> Float[Tensor, " d"]:
    """Return mean(positive rows) - mean(negative rows) in raw units, float64.

    Points towards label 1 by construction. Raises ValueError for one class only, lengths that differ, values that are
    not finite, or class means that are equal.
    """
    rows, labels = labelled_rows(X, y)
    positive = torch.from_numpy(labels == 1)
    means = [rows[chosen].mean(0, dtype=torch.float64) for chosen in (positive, ~positive)]  # fp32 sums drift
    difference = means[0] - means[1]
    if float(difference.norm()) <= 1e-10 * max(float(m.norm()) for m in means):
        raise ValueError("the class means are equal: these rows show no difference between the labels")
    return difference


METHODS: dict[str, Callable[[Rows, Labels], Tensor]] = {"mean_difference": mean_difference}


def fit_direction(
    X: Rows, y: Labels, *, method: str = "mean_difference", hook: str | None = None, model: Any = None
) -> Direction:
    """Return the direction that leads from label 0 to label 1, with its provenance.

    X holds one row an example, in raw activation units. Give the model (an interp Model or a Hugging Face model) and
    hook point that the rows come from: strengths are measured there, and other models refuse the direction. METHODS
    lists the methods. Raises ValueError for an unknown method and as the method does.
    """
    if method not in METHODS:
        raise ValueError(f"there is no method {method!r}; there are: {', '.join(METHODS)}")
    rows, labels = labelled_rows(X, y)
    vector = METHODS[method](X, y)
    return labelled_direction(vector, rows, labels, method=method, hook=hook, model=model)


def labelled_direction(
    vector: Tensor, rows: Tensor, labels: np.ndarray, *, method: str, hook: str | None, model: Any
) -> Direction:
    """Return a vector as a Direction whose sign is that of the data, with the mean projection of each class."""
    unit = vector.double() / vector.double().norm()
    along = (rows.double() @ unit).numpy()
    negative, positive = float(along[labels == 0].mean()), float(along[labels == 1].mean())
    if positive < negative:
        vector, negative, positive = -vector, -negative, -positive
    return direction_from(
        vector,
        hook=hook,
        model=model,
        method=method,
        negative=negative,
        positive=positive,
        data=data_fingerprint(rows, labels),
    )


def latent_direction(sae: Any, latent: int, hook: str, model: Any) -> Direction:
    """Return the decoder row of an SAE's latent as a Direction; its scale is the row's length.

    Raises ValueError where the SAE has no such latent or the row is zero, DirectionError where its width is not that
    of the hook point.
    """
    rows = sae.W_dec
    if not 0 <= latent < len(rows):
        raise ValueError(f"latent {latent} is not one of the {len(rows)} of this SAE")
    return direction_from(rows[latent], hook=hook, model=model, method=f"sae latent {latent}")


def labelled_rows(X: Tensor | np.ndarray, y: Labels) -> tuple[Tensor, np.ndarray]:
    """Return checked rows and labels. Raises ValueError where these are not finite, [n, d], two-class, equally many."""
    rows, labels = as_rows(X), as_labels(y)
    if len(rows) != len(labels):
        raise ValueError(f"{len(labels)} labels were given for {len(rows)} rows")
    return rows, labels
