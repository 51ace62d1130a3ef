"""Check the schedules of lambda in closed form: at begin and end, at joints, and for degenerate phases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qt_jax import schedules
from qt_jax.errors import InvalidInput

RAMPS = {"quartic": schedules.quartic, "linear": schedules.linear, "cosine": schedules.cosine}
CLOSED_FORM = {
    "quartic": lambda p: p**4,
    "linear": lambda p: p,
    "cosine": lambda p: (1 - np.cos(np.pi * p)) / 2,
}
ALL = {
    "warmup_quartic_quadratic": schedules.warmup_quartic_quadratic,
    **RAMPS,
    "step": schedules.step,
    "constant": lambda total_steps: schedules.constant(0.3),
}


def three_phases(count, total, warmup, joint, end, joint_value):
    """The paper's curriculum in the words of its definition, for one count, in Python floats."""
    if count >= end * total:
        return 1.0
    if count >= joint * total:
        return joint_value + (1 - joint_value) * ((count - joint * total) / ((end - joint) * total)) ** 2
    if count >= warmup * total:
        return joint_value * ((count - warmup * total) / ((joint - warmup) * total)) ** 4
    return 0.0


@pytest.mark.parametrize("settings", [(0.2, 0.6, 0.85, 0.5), (0.0, 0.5, 1.0, 0.1), (0.3, 0.31, 0.99, 0.95)])
def test_three_phases_follow_their_closed_form(settings):
    warmup, joint, end, joint_value = settings
    schedule = schedules.warmup_quartic_quadratic(
        1000, warmup=warmup, joint=joint, end=end, joint_value=joint_value
    )
    expected = [three_phases(count, 1000, *settings) for count in range(1101)]
    np.testing.assert_allclose(schedule(jnp.arange(1101)), expected, rtol=2e-6, atol=1e-9)


def test_three_phases_are_exact_at_their_joints():
    schedule = schedules.warmup_quartic_quadratic(1000, joint_value=0.3)
    assert [float(schedule(c)) for c in (0, 199, 200)] == [0.0, 0.0, 0.0]
    assert float(schedule(600)) == np.float32(0.3)
    assert float(schedule(400)) == pytest.approx(0.3 / 16)
    assert float(schedule(725)) == pytest.approx(0.3 + 0.7 / 4)
    assert float(schedule(849)) < 1.0
    assert [float(schedule(c)) for c in (850, 851, 1000, 2**31 - 1)] == [1.0] * 4


@pytest.mark.parametrize("joint_value", np.linspace(0.0, 1.0, 41))
def test_three_phases_stay_in_bounds_for_every_joint_value(joint_value):
    values = np.asarray(schedules.warmup_quartic_quadratic(400, joint_value=joint_value)(jnp.arange(401)))
    assert values.min() == 0.0 and values.max() == 1.0
    assert (np.diff(values) >= 0).all()


@pytest.mark.parametrize("name", RAMPS)
def test_ramps_follow_their_closed_form(name):
    schedule = RAMPS[name](500, warmup=0.1, end=0.9)
    count = np.arange(601)
    expected = CLOSED_FORM[name](np.clip((count - 50) / 400, 0, 1))
    np.testing.assert_allclose(schedule(jnp.asarray(count)), expected, rtol=2e-6, atol=1e-12)
    assert [float(schedule(c)) for c in (0, 50, 450, 500)] == [0.0, 0.0, 1.0, 1.0]


def test_step_switches_at_its_step():
    assert [float(schedules.step(100, at=0.07)(c)) for c in (0, 6, 7, 100)] == [0.0, 0.0, 1.0, 1.0]
    assert [float(schedules.step(100, at=0.0)(c)) for c in (0, 1)] == [1.0, 1.0]
    assert [float(schedules.step(100, at=1.0)(c)) for c in (99, 100)] == [0.0, 1.0]


def test_constant_is_constant():
    assert [float(schedules.constant(v)(c)) for v in (0.0, 1.0) for c in (0, 10**6)] == [0.0, 0.0, 1.0, 1.0]
    assert float(schedules.constant()(3)) == 1.0


@pytest.mark.parametrize("name", ["warmup_quartic_quadratic", *RAMPS, "step"])
def test_without_steps_every_phase_is_a_jump(name):
    assert [float(ALL[name](0)(count)) for count in (0, 1, 7)] == [1.0, 1.0, 1.0]
    assert [float(ALL[name](1)(count)) for count in (0, 1, 7)] == [0.0, 1.0, 1.0]


def test_phases_of_length_zero_are_jumps():
    make = schedules.warmup_quartic_quadratic
    no_quartic = make(100, warmup=0.5, joint=0.5, end=0.9, joint_value=0.25)
    assert [float(no_quartic(c)) for c in (49, 50, 70, 90)] == [0.0, 0.25, pytest.approx(0.4375), 1.0]
    no_quadratic = make(100, warmup=0.5, joint=0.9, end=0.9, joint_value=0.25)
    assert [float(no_quadratic(c)) for c in (50, 70, 90)] == [0.0, pytest.approx(0.25 / 16), 1.0]
    at_once = make(100, warmup=0.0, joint=0.0, end=0.0)
    assert float(at_once(0)) == 1.0
    assert [float(schedules.quartic(100, warmup=0.4, end=0.4)(c)) for c in (39, 40)] == [0.0, 1.0]


fraction = st.floats(0.0, 1.0)
fractions = st.tuples(fraction, fraction, fraction).map(sorted)
COUNTS = np.unique(np.concatenate([np.arange(300), np.geomspace(300, 2**24, 700)]).astype(np.int32))


@given(st.sampled_from([*ALL]), st.integers(0, 2**24), fractions, fraction)
@example("warmup_quartic_quadratic", 100, [0.0, 5e-324, 1e-300], 1e-45)
@example("cosine", 2**24, [0.0, 0.5, 1.0], 0.5)
def test_lambda_is_bounded_and_never_decreases(name, total_steps, phases, value):
    begin, joint, end = phases
    schedule = {
        "warmup_quartic_quadratic": lambda: schedules.warmup_quartic_quadratic(
            total_steps, warmup=begin, joint=joint, end=end, joint_value=value
        ),
        "step": lambda: schedules.step(total_steps, at=value),
        "constant": lambda: schedules.constant(value),
    }.get(name, lambda: ALL[name](total_steps, warmup=begin, end=end))()
    values = np.asarray(schedule(COUNTS))
    assert np.isfinite(values).all() and values.min() >= 0.0 and values.max() <= 1.0
    assert (np.diff(values) >= 0).all()
    if name != "constant":
        assert float(schedule(max(total_steps, 1))) == 1.0


@pytest.mark.parametrize("name", [name for name in ALL if name != "step"])
def test_lambda_is_continuous(name):
    # the steepest slope of any of them is 4 / length, here 4 / (0.25 * 10^5) of a step
    values = np.asarray(ALL[name](10**5)(jnp.arange(10**5 + 1)))
    assert np.diff(values).max() < 4 / (0.25 * 10**5)


@pytest.mark.parametrize("name", ALL)
def test_traced_once_and_equal_to_eager(name):
    schedule, traces = ALL[name](60), []

    @jax.jit
    def traced(count):
        traces.append(count)
        return schedule(count)

    compiled = [traced(jnp.int32(count)) for count in range(64)]
    assert len(traces) == 1
    assert all(value.dtype == jnp.float32 and value.shape == () for value in compiled)
    eager = schedule(jnp.arange(64))
    np.testing.assert_array_max_ulp(np.asarray(jnp.stack(compiled)), np.asarray(eager), maxulp=2)
    np.testing.assert_array_max_ulp(
        np.asarray(jax.vmap(schedule)(jnp.arange(64))), np.asarray(eager), maxulp=2
    )


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "count", [5, np.int64(5), np.array([5, 6]), jnp.uint32(5), jnp.arange(6).reshape(2, 3), 2**40]
)
def test_count_may_be_any_integer(name, count):
    value = ALL[name](10)(count)
    assert isinstance(value, jax.Array) and value.dtype == jnp.float32 and value.shape == np.shape(count)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: schedules.warmup_quartic_quadratic(-1), "total_steps must be an int of at least 0, got -1"),
        (lambda: schedules.linear(10.0), r"total_steps must be an int of at least 0, got 10\.0"),
        (lambda: schedules.linear(True), "total_steps must be an int"),
        (lambda: schedules.cosine(10, warmup=-0.1), r"warmup .* must be a number in \[0, 1\], got -0.1"),
        (lambda: schedules.quartic(10, end=float("nan")), r"end .* must be a number in \[0, 1\], got nan"),
        (lambda: schedules.step(10, at="half"), r"at .* must be a number in \[0, 1\], got 'half'"),
        (lambda: schedules.quartic(10, warmup=0.9, end=0.1), "warmup <= end; got warmup=0.9, end=0.1"),
        (
            lambda: schedules.warmup_quartic_quadratic(10, joint=0.9),
            "warmup <= joint <= end; got warmup=0.2, joint",
        ),
        (lambda: schedules.warmup_quartic_quadratic(10, joint_value=1.5), "joint_value must be a number in"),
        (lambda: schedules.constant(2), "value must be a number in"),
    ],
)
def test_wrong_settings_are_refused(make, complaint):
    with pytest.raises(InvalidInput, match=complaint):
        make()
