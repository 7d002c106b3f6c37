"""
Solvers of fixed steps against known answers: order conditions, measured orders of convergence, the closed form of the
flow to Gaussian data, and the end points of SiT's own solvers on it.
"""

import itertools
import math

import pytest
import torch
from golden_data import GAUSSIAN, gaussian_error, gaussian_velocity, solve_gaussian

from diffusers_dod import DoDFlowMatchScheduler
from diffusers_dod.tableaus import SOLVERS, weighted_sum


def find_trees(order: int) -> set[tuple]:
    """All rooted trees with so many nodes; a tree is the sorted tuple of its root's subtrees."""
    if order == 1:
        return {()}
    found = set()
    for size in range(1, order):  # of one subtree of the root, beside the others
        for rest, subtree in itertools.product(find_trees(order - size), find_trees(size)):
            found.add(tuple(sorted((*rest, subtree))))
    return found


def count_nodes(tree: tuple) -> int:
    return 1 + sum(map(count_nodes, tree))


def density(tree: tuple) -> int:
    return count_nodes(tree) * math.prod(map(density, tree))


def tree_error(weights: list[list[float]], solution: tuple[float, ...], tree: tuple) -> float:
    """How far a method is from Butcher's order condition of a tree."""

    def stages(tree: tuple) -> list[float]:
        inner = [stages(subtree) for subtree in tree]
        return [
            math.prod(sum(a * x for a, x in zip(row, values, strict=False)) for values in inner) for row in weights
        ]

    return abs(sum(b * x for b, x in zip(solution, stages(tree), strict=True)) - 1 / density(tree))


def order_of(weights: list[list[float]], solution: tuple[float, ...]) -> int:
    """The greatest order whose conditions a method fulfils, and all lower ones."""
    for order in itertools.count(1):
        if any(tree_error(weights, solution, tree) > 1e-12 for tree in find_trees(order)):
            return order - 1


def test_there_are_as_many_trees_as_there_should_be():
    assert [len(find_trees(order)) for order in range(1, 7)] == [1, 1, 2, 4, 9, 20]


@pytest.mark.parametrize("solver", SOLVERS)
def test_each_method_has_its_order(solver):
    tableau = SOLVERS[solver].tableau
    number = len(tableau.nodes)
    assert [len(row) for row in tableau.weights] == list(range(number)) and len(tableau.solution) == number
    assert [sum(row) for row in tableau.weights] == pytest.approx(tableau.nodes)
    assert order_of(tableau.weights, tableau.solution) == tableau.order
    if SOLVERS[solver].is_adaptive:
        embedded = tuple(b - error for b, error in zip(tableau.solution, tableau.error, strict=True))
        assert order_of(tableau.weights, embedded) == tableau.order - 1
        # The last evaluation is the first of the next step.
        assert (*tableau.weights[-1], 0.0) == tableau.solution and tableau.nodes[-1] == 1


def test_kinds_of_solvers():
    assert [name for name, solver in SOLVERS.items() if solver.is_adaptive] == ["dopri5"]
    assert [name for name, solver in SOLVERS.items() if solver.is_stochastic] == ["euler_maruyama", "stochastic_heun"]
    assert [name for name, solver in SOLVERS.items() if solver.noise_before] == ["stochastic_heun"]


def test_a_weighted_sum_leaves_out_weights_of_zero():
    nan, values = torch.full((2,), math.nan), torch.tensor([1.0, -2.0])
    assert torch.equal(weighted_sum((0.5, 0.0, 2.0), (values, nan, values)), 2.5 * values)


@pytest.mark.parametrize(
    ("solver", "steps", "name"),
    [
        ("euler", 10, "euler_pts11"),
        ("euler", 50, "euler_pts51"),
        ("midpoint", 10, "midpoint_pts11"),
        ("heun", 10, "heun2_pts11"),
        ("heun", 50, "heun2_pts51"),
    ],
)
def test_fixed_steps_agree_with_sit(solver, steps, name):
    output = solve_gaussian(solver, steps)
    torch.testing.assert_close(output.prev_sample, GAUSSIAN[name], atol=5e-6, rtol=0)
    assert output.num_evaluations.tolist() == [GAUSSIAN[f"{name}.nfe"]] * 2
    assert output.num_accepted.tolist() == [steps] * 2 and output.num_rejected.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("solver", "steps", "order"), [("euler", 64, 1), ("midpoint", 16, 2), ("heun", 16, 2), ("rk4", 5, 4)]
)
def test_order_of_convergence(solver, steps, order):
    """
    The equation is d x / d sigma = -4 sin(x), for which tan(x / 2) is an exponential. For the Gaussian flow, which is
    linear in x, midpoint has a higher order. More steps would show the rounding of fp32.
    """
    noise = torch.linspace(0.2, 0.8, 8, dtype=torch.float64)[:, None]
    exact = 2 * torch.atan(torch.tan(noise / 2) * math.exp(4))
    errors = []
    for num_inference_steps in (steps, 2 * steps, 4 * steps):
        scheduler = DoDFlowMatchScheduler(solver=solver)
        scheduler.set_timesteps(num_inference_steps)
        output = scheduler.solve(lambda x, t, indices: -4 * torch.sin(x), noise)
        errors.append((output.prev_sample / exact - 1).abs().max().item())
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize(
    ("solver", "steps", "tolerance"),
    [("euler", 50, 0.1), ("midpoint", 50, 2e-5), ("heun", 50, 1e-3), ("rk4", 12, 2e-5)],
)
def test_the_closed_form_is_reached(solver, steps, tolerance):
    assert gaussian_error(solve_gaussian(solver, steps).prev_sample) < tolerance


def test_a_flipped_direction_is_noticed():
    scheduler = DoDFlowMatchScheduler()
    scheduler.set_timesteps(50)
    wrong_sign = scheduler.solve(lambda x, t, indices: -gaussian_velocity(x, t), GAUSSIAN["noise"]).prev_sample
    wrong_time = scheduler.solve(lambda x, t, indices: gaussian_velocity(x, 1000 - t), GAUSSIAN["noise"]).prev_sample
    assert gaussian_error(solve_gaussian("euler", 50).prev_sample) < 0.1
    assert min(gaussian_error(wrong_sign), gaussian_error(wrong_time)) > 0.1
