"""The TensorFlow backend: what a graph holds, and what it must not."""

import gc
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from tests.contracts.scenarios import Classifier

import legato
from legato import backends
from legato.errors import BackendError, StepError


def compile_step(step, *, capacity=4, losses_in_step=False):
    """A step over indices, which it is given as its batch."""
    return backends.current().compile_loop(
        step,
        fetch=lambda resident, operands, index: operands[index],
        resident=None,
        operands=np.zeros(capacity, np.int32),
        mode=None,
        losses_in_step=losses_in_step,
    )


def run(loop, num_steps, first=0, capacity=4):
    operands = np.arange(first, first + capacity, dtype=np.int32)
    logs = loop(first, num_steps, operands)
    return backends.current().to_host(logs, num_steps)


def variable(value, **options):
    return keras.Variable(value, **{"dtype": "float32", **options})


def value(variable):
    return np.array(ops.convert_to_numpy(variable))


# -- loops -------------------------------------------------------------------


def test_a_loop_runs_as_many_steps_as_it_is_told():
    total, factor = variable(0.0), variable(2.0)
    calls = []

    def step(batch, at):
        calls.append(1)
        total.assign_add(factor * ops.cast(batch, "float32"))
        return {"at": at, "total": total, "half": 0.5}

    loop = compile_step(step)
    assert len(calls) == loop.traces == 1
    assert (loop.mode, loop.log_names) == ("fused", ["at", "total", "half"])
    assert list(map(id, loop.updated)) == [id(total)]
    assert list(map(id, loop.read_only)) == [id(factor)]
    assert float(total) == 0
    rows = run(loop, 3)
    assert rows.dtype == np.float32
    assert rows.tolist() == [[0, 0, 0.5], [1, 2, 0.5], [2, 6, 0.5]]
    assert run(loop, 1, first=3).tolist() == [[3, 12, 0.5]]
    assert run(loop, 0).shape == (0, 3)
    assert len(calls) == 1
    assert float(total) == 12


def test_a_step_without_logs():
    count = variable(0, dtype="int32")

    def step(batch, at):
        count.assign_add(1)
        return {}

    loop = compile_step(step)
    assert run(loop, 2).shape == (2, 0)
    assert int(count) == 2


def test_a_value_that_was_read_stays_when_the_variable_is_assigned():
    count = variable(1.0)

    def step(batch, at):
        before = count.value
        count.assign(before + 1)
        between = count.value
        ops.cond(before > 0, lambda: count.assign(between * 10), lambda: 0.0)
        return {"before": before, "between": between, "after": count.value}

    assert run(compile_step(step), 1).tolist() == [[1, 2, 20]]


def test_assignments_in_branches_and_loops():
    count, total = variable(0, dtype="int32"), variable(0.0)

    def step(batch, at):
        def body(i):
            count.assign_add(1)
            ops.cond(
                ops.equal(count % 2, 0),
                lambda: total.assign_add(1.0),
                lambda: total.assign_add(10.0),
            )
            return (i + 1,)

        ops.while_loop(lambda i: i < 3, body, (0,))
        return {"total": total.value}

    loop = compile_step(step)
    assert {id(v) for v in loop.updated} == {id(count), id(total)}
    assert run(loop, 2).tolist() == [[21], [33]]


def test_a_variable_that_is_read_in_a_branch_only_is_not_written():
    wanted, read, written = variable(1.0), variable(2.0), variable(0.0)

    def step(batch, at):
        loss = ops.cond(wanted > 0, lambda: read * 2.0, lambda: ops.zeros(()))
        written.assign(loss)
        return {"loss": loss}

    loop = compile_step(step)
    assert {id(v) for v in loop.read_only} == {id(wanted), id(read)}
    assert {id(v) for v in loop.updated} == {id(written)}


def test_variables_that_evade_the_scope_are_found():
    sly, read, noted = variable(1.0), variable(5.0), variable(0.0)

    def step(batch, at):
        sly._value.assign_add(read._value)
        noted.assign(1.0)
        return {"sly": sly.value}

    def evading(batch, at):
        step(batch, at)
        return {"sly": sly._value}

    for each in (step, evading):
        loop = compile_step(each)
        assert {id(v) for v in loop.updated} == {id(sly), id(noted)}
        assert {id(v) for v in loop.read_only} == {id(read)}


def test_two_variables_that_share_their_memory():
    one = variable(1.0)
    two = keras.Variable(one._value)
    assert two._value is one._value

    def step(batch, at):
        one.assign_add(1.0)
        return {"two": two.value}

    loop = compile_step(step)
    assert {id(v) for v in loop.updated} == {id(one), id(two)}
    assert run(loop, 2).tolist() == [[2], [3]]


def test_variables_of_all_dtypes_and_sizes():
    dtypes = ["float16", "bfloat16", "float64", "int8", "int64", "uint8"]
    counts = [variable(np.ones(2), dtype=dtype) for dtype in dtypes]
    flag, empty = variable(False, dtype="bool"), variable(np.ones((0, 3)))

    def step(batch, at):
        for count in counts:
            count.assign(count * 2 + ops.cast(batch, count.dtype))
        flag.assign(ops.logical_not(flag))
        empty.assign(empty + 1)
        return {"flag": flag}

    assert run(compile_step(step), 3)[:, 0].tolist() == [1, 0, 1]
    for count, dtype in zip(counts, dtypes, strict=True):
        assert keras.backend.standardize_dtype(count.dtype) == dtype
        assert value(count).astype(float).tolist() == [12, 12]
    assert value(empty).shape == (0, 3)


# -- what is made lazily -----------------------------------------------------


class Lazy(Classifier):
    """Everything is made in the first step, some of it in a conditional."""

    def build_model(self):
        return keras.Sequential(
            [layers.Dense(16, activation="tanh"), layers.Dense(3)]
        )

    def build_optimizer(self):
        return keras.optimizers.LossScaleOptimizer(
            keras.optimizers.Nadam(0.01), initial_scale=8.0
        )

    def build_metrics(self, training):
        return [keras.metrics.F1Score(name="f1")]

    def process_metrics(self, metrics, labels, model_outputs):
        for metric in metrics or ():
            metric.update_state(ops.one_hot(labels, 3), model_outputs)

    def train_step(self, inputs, model, optimizer, metrics=None):
        features, labels = inputs

        def forward():
            outputs = model(features, training=True)
            return self.build_losses(labels, outputs, model.losses), outputs

        # Unlike in the engine's own step, the variables are there only then.
        model(features, training=False)
        (loss, outputs), gradients = legato.value_and_grad(
            forward, model.trainable_variables, optimizer
        )
        optimizer.apply(gradients, model.trainable_variables)
        self.process_metrics(metrics, labels, outputs)
        return {self.loss: loss, "scale": optimizer.dynamic_scale.value}


@pytest.mark.parametrize("interval", [1, 3])
def test_everything_may_be_made_lazily(interval, tmp_path):
    config = {
        "train_steps": 7,
        "summary_interval": 1,
        "progress": "none",
        "train_metrics_interval": interval,
    }
    weights = []
    for cut in (7, 3):
        trainer = legato.Trainer(
            Lazy(),
            run_dir=tmp_path / str(cut),
            config=legato.TrainerConfig(checkpoint_interval=cut, **config),
        )
        trainer.train()
        weights.append([value(v).tobytes() for v in trainer.model.variables])
        assert value(trainer.optimizer.iterations) == 7
    assert weights[0] == weights[1]


# -- what no checkpoint could hold -------------------------------------------


@pytest.mark.parametrize(
    "draw",
    [
        lambda: tf.random.normal(()),
        lambda: tf.random.uniform((), maxval=3, dtype="int32"),
        lambda: tf.random.truncated_normal(()),
        lambda: tf.random.shuffle(tf.range(3))[0],
        lambda: tf.random.gamma((), 1.0),
        lambda: tf.random.categorical([[0.5, 0.5]], 1)[0, 0],
        lambda: tf.random.poisson((), 1.0),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_the_generators_of_tensorflow_are_refused(draw, nested):
    def step(batch, at):
        if not nested:
            return {"noise": draw()}
        return {"noise": ops.cond(at > 0, draw, lambda: draw() * 0)}

    with pytest.raises(StepError, match=r"draws random numbers.*keras\.random"):
        compile_step(step)


def test_a_generator_with_a_variable_is_refused():
    generator = tf.random.Generator.from_seed(3)
    with pytest.raises(StepError, match=r"SeedGenerator"):
        compile_step(lambda batch, at: {"noise": generator.normal(())})


def test_native_variables_are_refused_where_they_are_written():
    native = tf.Variable(1.0, name="mine")

    def step(batch, at):
        native.assign_add(1.0)
        return {"native": native.value()}

    with pytest.raises(StepError, match=r"mine.*no keras\.Variable"):
        compile_step(step)
    loop = compile_step(lambda batch, at: {"native": native.value()})
    assert run(loop, 1).tolist() == [[1]]
    assert loop.variables == []


def test_an_iterator_is_refused():
    iterator = iter(tf.data.Dataset.range(9))
    with pytest.raises(StepError, match=r"IteratorGetNext.*build_inputs"):
        compile_step(lambda batch, at: {"next": next(iterator)})


def test_lookup_tables_may_be_used():
    table = tf.lookup.StaticHashTable(
        tf.lookup.KeyValueTensorInitializer([0, 1], [7.0, 8.0]), -1.0
    )
    loop = compile_step(lambda batch, at: {"found": table.lookup(at)})
    assert run(loop, 3)[:, 0].tolist() == [7, 8, -1]


def test_the_value_of_a_tensor_in_python():
    def step(batch, at):
        return {"x": 1.0 if at > 1 else 2.0}

    with pytest.raises(StepError, match=r"keras\.ops\.cond"):
        compile_step(step)


# -- gradients ---------------------------------------------------------------


def in_a_step(function):
    """What a function returns, computed in a compiled step."""
    names = []

    def step(batch, at):
        logs = {
            str(k): ops.sum(leaf)
            for k, leaf in enumerate(keras.tree.flatten(function()))
        }
        names[:] = logs
        return logs

    return run(compile_step(step), 1)[0].tolist()


def outside(function):
    return [float(ops.sum(leaf)) for leaf in keras.tree.flatten(function())]


@pytest.fixture(params=[in_a_step, outside])
def compute(request):
    return request.param


def test_gradients_of_gradients(compute):
    a, b = variable(3.0), variable(2.0)

    def penalty():
        loss, (gradient,) = legato.value_and_grad(lambda: a**3 * b, [a])
        return loss + gradient**2

    # a**3 b + 9 a**4 b**2
    loss, *gradients = compute(lambda: legato.value_and_grad(penalty, [a, b]))
    assert loss == 27 * 2 + 9 * 81 * 4
    assert gradients == [3 * 9 * 2 + 36 * 27 * 4, 27 + 18 * 81 * 2]


def test_a_loss_and_logs_that_are_variables(compute):
    a = variable(3.0)
    assert compute(lambda: legato.value_and_grad(lambda: a, [a])) == [3, 1]
    loop = compile_step(lambda batch, at: {"a": a})
    assert [id(v) for v in loop.read_only] == [id(a)]
    assert run(loop, 1).tolist() == [[3]]


def test_an_embedding_has_a_dense_gradient():
    embedding = layers.Embedding(5, 3)
    embedding.build()
    indices = np.array([[0, 2, 2], [4, 2, 0]])

    _, (gradient,) = legato.value_and_grad(
        lambda: ops.sum(embedding(indices)), embedding.trainable_variables
    )
    assert isinstance(gradient, tf.Tensor)
    assert value(gradient)[:, 0].tolist() == [2, 0, 3, 0, 1]


def test_gradients_have_the_dtype_of_their_variables():
    policy = keras.DTypePolicy("mixed_float16")
    dense = layers.Dense(2, dtype=policy)
    dense.build((None, 3))
    half = variable(2.0, dtype="float16")
    whole = variable(3, dtype="int32")

    def forward():
        outputs = dense(np.ones((4, 3), "float32"))
        loss = ops.cast(ops.mean(outputs) * half, "float32")
        return loss * ops.cast(whole, "float32")

    variables = [*dense.trainable_variables, half]
    _, gradients = legato.value_and_grad(forward, [*variables, whole])
    for each, gradient in zip(variables, gradients[:-1], strict=True):
        assert gradient.dtype == each._value.dtype
        assert gradient.shape == each.shape
    assert gradients[-1] is None


def test_frozen_variables_have_gradients(compute):
    frozen = variable(3.0, trainable=False)
    assert compute(
        lambda: legato.value_and_grad(lambda: frozen * frozen, [frozen])
    ) == [9, 6]


def test_gradients_through_recomputation_and_custom_gradients(compute):
    a = variable(3.0)

    @ops.custom_gradient
    def doubled(x):
        def gradient(*arguments, upstream=None):
            return (upstream if upstream is not None else arguments[0]) * 5

        return x * 2, gradient

    def forward():
        return keras.remat(lambda x: x * a * a)(ops.ones(())) + doubled(a.value)

    loss, gradient = compute(lambda: legato.value_and_grad(forward, [a]))
    assert (loss, gradient) == (15, 11)


def test_none_for_what_is_not_reached_through_a_recurrent_layer():
    lstm, lost = layers.LSTM(3), layers.Dense(2)
    sequences = np.ones((2, 5, 4), "float32")
    lost.build((None, 4))
    lstm.build(sequences.shape)

    def forward():
        unused = lost(sequences)
        outputs = lstm(sequences)
        return ops.mean(outputs), unused

    variables = [*lstm.trainable_variables, *lost.trainable_variables]
    _, gradients = legato.value_and_grad(forward, variables)
    assert [g is None for g in gradients] == [False] * 3 + [True] * 2


@pytest.mark.parametrize("depth", range(3))
def test_none_through_loops_in_branches_in_loops(depth, compute):
    used, stopped, late = variable(2.0), variable(3.0), variable(5.0)

    def loop(x, times):
        def body(i, x, y, z):
            y = y + ops.stop_gradient(stopped.value) * late
            return i + 1, x * used, y, z + ops.cast(y > 0, "float32")

        _, x, _, z = ops.while_loop(
            lambda i, x, y, z: i < times, body, (0, x, 0.0, 0.0)
        )
        return x + ops.stop_gradient(z)

    def forward():
        x = ops.ones(())
        if depth == 0:
            return loop(x, 2)
        if depth == 1:
            return ops.cond(used > 0, lambda: loop(x, 2), lambda: x)
        _, x = ops.while_loop(
            lambda i, x: i < 2,
            lambda i, x: (
                i + 1,
                ops.cond(i < 5, lambda: loop(x, 1), lambda: x * used),
            ),
            (0, x),
        )
        return x

    (found,) = {
        tuple(g is None for g in gradients)
        for gradients in [
            legato.value_and_grad(forward, [used, stopped, late])[1]
        ]
    }
    assert found == (False, True, True)

    def gradient():
        _, gradients = legato.value_and_grad(forward, [used, late])
        return gradients[0]

    expected = {0: 4.0, 1: 4.0, 2: 5.0}
    assert compute(gradient) == [expected[depth]]


def test_a_model_is_built_by_forward_outside_of_a_step():
    model = keras.Sequential([layers.Dense(3), layers.BatchNormalization()])
    features = np.ones((4, 2), "float32")
    kernel = variable(1.0)

    def forward():
        return ops.mean(model(features, training=True)) + kernel

    for _ in range(2):
        _, gradients = legato.value_and_grad(forward, [kernel])
        assert float(gradients[0]) == 1
    assert len(model.trainable_variables) == 4


# -- failures ----------------------------------------------------------------


@pytest.fixture
def half_done():
    """A step that fails in its third run, when it has changed a variable."""
    count, other = variable(0.0), variable(1.0)

    def step(batch, at):
        count.assign_add(other)
        with tf.control_dependencies([tf.debugging.assert_less(at, 2)]):
            return {"count": count.value}

    return compile_step(step), count, other


def test_what_a_failed_call_leaves_is_reported(half_done):
    loop, count, other = half_done
    backend = backends.current()
    assert run(loop, 2).tolist() == [[1], [2]]
    with pytest.raises(tf.errors.InvalidArgumentError):
        run(loop, 4)
    (lost,) = backend.lost_variables([count, other])
    assert lost is count
    with pytest.raises(BackendError, match="no valid values"):
        run(loop, 1)
    backend.write([count], [np.float32(4)])
    assert backend.lost_variables([count, other]) == []
    assert run(loop, 1).tolist() == [[5]]


def test_a_failed_call_does_not_keep_what_is_gone():
    def fail():
        count = variable(0.0)

        def step(batch, at):
            count.assign_add(1.0)
            tf.debugging.assert_less(at, 0)
            return {}

        with pytest.raises(tf.errors.InvalidArgumentError):
            run(compile_step(step), 1)
        return weakref.ref(count)

    gone = fail()
    gc.collect()
    assert gone() is None
    # Another variable may come to lie at the same place.
    fresh = [variable(0.0) for _ in range(100)]
    assert backends.current().lost_variables(fresh) == []


# -- the other verbs ---------------------------------------------------------


def test_values_are_written_and_read_bit_for_bit():
    backend = backends.current()
    bits = {
        "float32": np.array([0x7FC00001, 0xFFA00000, 0x80000000], "uint32"),
        "float16": np.array([0x7E01, 0xFD00, 0x8000], "uint16"),
        "bfloat16": np.array([0x7FC1, 0xFFA0, 0x8000], "uint16"),
        "float64": np.array([2**63 - 7, 1, 2**63], "uint64"),
    }
    variables = [variable(np.zeros(3), dtype=dtype) for dtype in bits]
    arrays = [
        array.view(each._value.dtype.as_numpy_dtype)
        for each, array in zip(variables, bits.values(), strict=True)
    ]
    backend.write(variables, arrays)
    given = [array.tobytes() for array in arrays]
    assert [array.tobytes() for array in backend.read(variables)] == given
    for each in variables:
        each._value.assign_add(np.ones(3, each._value.dtype.as_numpy_dtype))
    # The caller's memory is not the variable's.
    assert [array.tobytes() for array in arrays] == given


def test_the_fingerprint_knows_what_changes_bits():
    found = backends.current().fingerprint()
    assert found["tensorflow"] == tf.__version__
    assert found["op_determinism"] is False
    assert {"intra_op_threads", "tensor_float_32", "jit"} <= found.keys()
