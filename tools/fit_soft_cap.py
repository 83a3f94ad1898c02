"""Fits the polynomial of kernels/triton/cap_series.py and prints its constants: `python tools/fit_soft_cap.py`.

tanh(y) is about y p(y^2) for |y| <= END, with the least largest relative error that a p of degree 2 can have (Remez'
exchange algorithm). Degree 2, not 3: the last coefficient must be positive, so that the polynomial grows past END.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

DEGREE, END = 2, 0.8
Numbers = NDArray[np.float64]


def tanh_over_y(t: Numbers) -> Numbers:
    """tanh(y) / y by t = y^2 > 0."""
    return np.tanh(np.sqrt(t)) / np.sqrt(t)


def fit(degree: int = DEGREE, end: float = END) -> tuple[Numbers, float]:
    """The coefficients of y, y^3, y^5, ... and the largest relative error."""
    grid = np.linspace(1e-9, end**2, 100_001)
    points = (1 - np.cos(np.linspace(0, np.pi, degree + 2))) / 2 * (end**2 - 1e-9) + 1e-9
    for _ in range(30):
        # The error, relative to tanh, is the same at all points, with alternating signs.
        signs = (-1.0) ** np.arange(degree + 2)
        system = np.column_stack([np.vander(points, degree + 1, increasing=True), signs * tanh_over_y(points)])
        coefficients = np.linalg.solve(system, tanh_over_y(points))[:-1]
        error = np.polyval(coefficients[::-1], grid) / tanh_over_y(grid) - 1
        # Next points: where the error is largest between two changes of its sign.
        changes = np.flatnonzero(np.diff(np.sign(error))) + 1
        pieces = np.split(np.arange(len(grid)), changes)
        points = np.array([grid[piece[np.abs(error[piece]).argmax()]] for piece in pieces])
    return coefficients, float(np.abs(error).max())


def main() -> None:
    """Print what cap_series.py holds."""
    coefficients, error = fit()
    for power, value in enumerate(coefficients):
        print(f"y^{2 * power + 1}: {value:.10f}")
    least = END * float(np.polyval(coefficients[::-1], END**2))
    print(f"largest relative error: 2^{np.log2(error):.2f}; value at {END}: {least:.4f}")


if __name__ == "__main__":
    main()
