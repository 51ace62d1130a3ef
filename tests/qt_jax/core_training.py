"""Train the small models of the core's tests: their config, their inputs, and a few passes."""

import jax

import qt_jax as qt

CONFIG = qt.QuantConfig()
X = jax.random.normal(jax.random.key(0), (16, 10))


def learned(model, variables, x, lam=1.0, config=CONFIG, passes=2, **options):
    """Attach statistics and take training passes; return the last outputs, the variables, and the visit."""
    variables = qt.attach_statistics(model, variables, config, x, **options)
    for _ in range(passes):
        with qt.quant_trim(config, lam, train=True) as visit:
            y, new = model.apply(variables, x, mutable=["batch_stats"], **options)
        variables = {**variables, **new}
    return y, variables, visit
