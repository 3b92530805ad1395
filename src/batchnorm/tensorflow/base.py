"""The base of a TensorFlow 1 layer: scopes, variables, losses, updates and collections.

What ``tf.compat.v1.layers.Layer`` gave its users, on TensorFlow alone. It works in v1 graphs, eagerly and in
``tf.function``, and is a ``tf.Module``, so that checkpoints and SavedModels find its variables.
"""

from __future__ import annotations

import collections
import contextvars
import dataclasses
import re
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from batchnorm.core.options import flag, received

from .serialization import get

__all__ = ["InputSpec", "Layer"]

v1 = tf.compat.v1


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """What a layer demands of its inputs.

    Attributes:
        ndim: The rank, or None.
        axes: Sizes that some axes must have, by axis.
    """

    ndim: int | None = None
    axes: dict[int, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _Book:
    """What a layer has made so far. A plain object, so that `tf.Module` leaves its lists alone."""

    trainable: list[Any] = dataclasses.field(default_factory=list)
    non_trainable: list[Any] = dataclasses.field(default_factory=list)
    updates: list[tuple[Any, list[Any]]] = dataclasses.field(default_factory=list)
    losses: list[tuple[Any, bool]] = dataclasses.field(default_factory=list)


_call_inputs: contextvars.ContextVar[list[Any]] = contextvars.ContextVar("call_inputs", default=[])  # noqa: B039
"""Inputs of the innermost call that is under way in this thread; never changed in place."""


class Layer(tf.Module):
    """Base class of layers in the manner of ``tf.compat.v1.layers``.

    A subclass makes its variables in `build` with `add_weight` and computes in `call`. A layer may hold layers: their
    variables, losses and updates are its own too, so a whole model can be a `Layer`.

    Args:
        trainable: Whether the variables that may be trained are.
        name: Name of the layer and of its variable scope; by default the class name in snake case, made unique.
        dtype: Type of the computation and of the variables; by default that of the first input. ``"mixed_float16"``
            and ``"mixed_bfloat16"`` compute in 16 bits and keep variables in float32.
        **kwargs: ``_scope`` and ``_reuse`` as in v1; ``activity_regularizer``, a function of the output to a loss;
            ``weights``, initial values. ``input_shape``, ``batch_input_shape``, ``batch_size``, ``input_dim``,
            ``autocast`` and ``implementation`` are accepted, as they always were, and mean nothing here.

    Raises:
        TypeError: For an unknown keyword.

    >>> class Model(Layer):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.bias = Bias()
    ...
    ...     def call(self, inputs):
    ...         return self.bias(inputs)
    >>> class Bias(Layer):
    ...     def build(self, input_shape):
    ...         self.value = self.add_weight("value", input_shape[-1:], initializer=tf.ones)
    ...
    ...     def call(self, inputs):
    ...         return inputs + self.value
    >>> model = Model()
    >>> model(tf.zeros([1, 2])).numpy()
    array([[1., 1.]], dtype=float32)
    >>> [variable.shape.as_list() for variable in model.trainable_variables]
    [[2]]
    """

    _IGNORED = frozenset({"input_shape", "batch_input_shape", "batch_size", "input_dim", "autocast", "implementation"})

    def __init__(self, trainable: bool = True, name: str | None = None, dtype: Any = None, **kwargs: Any) -> None:
        # tf.Module.__init__ is not called: it would open a name scope, and so use up the name of the first layer.
        scope, self._reuse = kwargs.pop("_scope", None), kwargs.pop("_reuse", None)
        self._activity_regularizer = get("activity_regularizer", kwargs.pop("activity_regularizer", None))
        self._initial_weights = kwargs.pop("weights", None)
        unknown = set(kwargs) - self._IGNORED
        if unknown:
            raise TypeError(f"{type(self).__name__}() got unknown keyword arguments {sorted(unknown)}.")
        if name is not None and not isinstance(name, (str, v1.VariableScope)):
            raise TypeError(f"name must be None or a string; {received(name)}.")
        self._dtype: str | None
        self._compute_dtype: str | None
        self.trainable = flag("trainable", trainable)
        self.built = False
        self.input_spec: InputSpec | None = None
        self._set_dtype(dtype)
        self._book = _Book()
        snake = _snake_case(type(self).__name__)
        self._base_name = (name.name if isinstance(name, v1.VariableScope) else name) or snake
        self._name = name if name and isinstance(name, str) else _unique_name(snake)
        self._scope: Any = None
        if scope:
            with v1.variable_scope(scope) as self._scope:
                pass

    # What it is called, and where it lives.

    @property
    def name(self) -> str:
        """Name of the layer."""
        return self._name

    @property
    def name_scope(self) -> Any:
        """The name scope of the layer's operations."""
        return tf.name_scope(self._name if self._scope is None else self._scope.original_name_scope)

    @property
    def scope_name(self) -> str:
        """Name of the variable scope, known from the first call on.

        Raises:
            ValueError: Before the first call.
        """
        if self._scope is None:
            raise ValueError(f'scope_name is not known before layer "{self._name}" has been called.')
        return self._scope.name  # type: ignore[no-any-return]

    @property
    def graph(self) -> None:
        """Deprecated: layers no longer keep their graph.

        Raises:
            RuntimeError: When executing eagerly.
        """
        warnings.warn("Layer.graph is deprecated: layers no longer keep their graph.", DeprecationWarning, stacklevel=2)
        if tf.executing_eagerly():
            raise RuntimeError("Layer.graph is not supported when executing eagerly.")

    @property
    def dtype(self) -> str | None:
        """Name of the type given, or that of the first input; None before it is known."""
        return self._dtype

    @property
    def compute_dtype(self) -> str | None:
        """Name of the type that the layer computes in and returns."""
        return self._compute_dtype

    def _set_dtype(self, dtype: Any) -> None:
        mixed = {"mixed_float16": "float16", "mixed_bfloat16": "bfloat16"}
        if hasattr(dtype, "compute_dtype"):  # a policy of Keras
            self._dtype, self._compute_dtype = dtype.variable_dtype, dtype.compute_dtype
        elif isinstance(dtype, str) and dtype in mixed:
            self._dtype, self._compute_dtype = "float32", mixed[dtype]
        else:
            try:
                self._dtype = None if dtype is None else tf.as_dtype(dtype).base_dtype.name
            except TypeError:
                raise TypeError(
                    f"dtype must be None, a type of TensorFlow or its name, or one of {list(mixed)}; {received(dtype)}."
                ) from None
            self._compute_dtype = self._dtype

    # Variables.

    def _layers(self) -> list[Layer]:
        return [self, *(module for module in self.submodules if isinstance(module, Layer))]

    @property
    def trainable_weights(self) -> list[Any]:
        """Variables to train; none when the layer is not trainable."""
        if not self.trainable:
            return []
        return [variable for layer in self._layers() if layer.trainable for variable in layer._book.trainable]

    @property
    def non_trainable_weights(self) -> list[Any]:
        """All other variables."""
        trained = {id(variable) for variable in self.trainable_weights}
        every = [v for layer in self._layers() for v in (*layer._book.trainable, *layer._book.non_trainable)]
        return [variable for variable in every if id(variable) not in trained]

    @property
    def weights(self) -> list[Any]:
        """All variables, those to train first."""
        return self.trainable_weights + self.non_trainable_weights

    @property
    def trainable_variables(self) -> list[Any]:
        """The same as `trainable_weights`."""
        return self.trainable_weights

    @property
    def non_trainable_variables(self) -> list[Any]:
        """The same as `non_trainable_weights`."""
        return self.non_trainable_weights

    @property
    def variables(self) -> list[Any]:
        """The same as `weights`."""
        return self.weights

    @tf.autograph.experimental.do_not_convert
    def add_weight(
        self,
        name: str,
        shape: Any = (),
        dtype: Any = None,
        initializer: Any = None,
        regularizer: Any = None,
        trainable: bool | None = None,
        constraint: Any = None,
        use_resource: bool | None = None,
        synchronization: Any = tf.VariableSynchronization.AUTO,
        aggregation: Any = tf.VariableAggregation.NONE,
        partitioner: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Make a variable in the layer's scope, or get the one that is there, through ``tf.compat.v1.get_variable``.

        Args:
            name: Name within the scope.
            shape: Its shape.
            dtype: Its type; by default the layer's, or float32.
            initializer: Function of shape and dtype; by default the scope's.
            regularizer: Function of the variable to a penalty, added to `losses` when the variable is new.
            trainable: Whether it may be trained; by default True unless it is synchronized on read.
            constraint: Projection that an optimizer applies after each step.
            use_resource: Whether it must be a resource variable.
            synchronization: When replicas synchronize it.
            aggregation: How replicas aggregate it.
            partitioner: Function that splits it into parts.
            **kwargs: ``experimental_autocast``, which means nothing here.

        Returns:
            The variable.

        Raises:
            ValueError: If a variable is synchronized on read and trainable.
            TypeError: For an unknown keyword.
        """
        if set(kwargs) - {"experimental_autocast"}:
            raise TypeError(f"add_weight() got unknown keyword arguments {sorted(kwargs)}.")
        on_read = synchronization == tf.VariableSynchronization.ON_READ
        if on_read and trainable:
            raise ValueError("trainable must not be True with synchronization ON_READ.")
        wanted = self.trainable and not on_read and trainable is not False
        initializer, regularizer = get("initializer", initializer), get("regularizer", regularizer)
        self._set_scope(None)
        with self._entered() as scope:
            before = {id(variable) for variable in v1.global_variables()} if regularizer else set()
            variable = v1.get_variable(
                name,
                shape=shape,
                dtype=tf.as_dtype(dtype or self._dtype or tf.float32),
                initializer=initializer if initializer is not None else scope.initializer,
                trainable=wanted,
                constraint=get("constraint", constraint),
                partitioner=partitioner,
                use_resource=use_resource or scope.use_resource,
                synchronization=synchronization,
                aggregation=aggregation,
            )
            parts = _parts(variable)
            if regularizer is not None and not any(id(part) in before for part in parts):
                for part in parts:
                    self.add_loss(_penalty(name, regularizer, part))
        for part in parts:  # a custom getter may have made it untrainable
            trained = wanted and getattr(part, "trainable", True)
            (self._book.trainable if trained else self._book.non_trainable).append(part)
        return variable

    def add_variable(self, *args: Any, **kwargs: Any) -> Any:
        """The same as `add_weight`."""
        return self.add_weight(*args, **kwargs)

    def get_weights(self) -> list[Any]:
        """Read all variables as NumPy arrays, in the order of `weights`.

        Raises:
            RuntimeError: In a graph without a default session.
        """
        if tf.executing_eagerly():
            return [variable.numpy() for variable in self.weights]
        return self._session("get_weights").run(self.weights)  # type: ignore[no-any-return]

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Set all variables from arrays, in the order of `weights`.

        Raises:
            ValueError: If the number or a shape of the arrays does not fit; nothing is set then.
            RuntimeError: In a graph without a default session.
        """
        variables = self.weights
        if len(variables) != len(weights):
            raise ValueError(f"weights must hold {len(variables)} arrays for {self.name}; received {len(weights)}.")
        for variable, value in zip(variables, weights, strict=True):
            shape = getattr(value, "shape", ())
            if not variable.shape.is_compatible_with(shape):
                raise ValueError(f"weights must hold shape {variable.shape} for {variable.name}; received {shape}.")
        if tf.executing_eagerly():
            for variable, value in zip(variables, weights, strict=True):
                variable.assign(value)
            return
        initializers = [variable.initializer for variable in variables]
        feed = {initializer.inputs[1]: value for initializer, value in zip(initializers, weights, strict=True)}
        self._session("set_weights").run(initializers, feed)

    def _session(self, method: str) -> Any:
        session = v1.get_default_session()
        if session is None:
            raise RuntimeError(f"{method} needs a default session in a graph: call it within `with session:`.")
        return session

    def count_params(self) -> int:
        """Count the numbers in all variables.

        Raises:
            ValueError: Before the layer is built.
        """
        if not self.built:
            raise ValueError(f"count_params is not known before layer {self.name} is built.")
        count = 0
        for variable in self.weights:
            count += variable.shape.num_elements()
        return count

    # Losses and updates.

    @property
    def losses(self) -> list[Any]:
        """Losses of the layer: penalties of regularizers and what `add_loss` was given."""
        return [loss for loss, _ in self._flagged_losses()]

    def _flagged_losses(self) -> list[tuple[Any, bool]]:
        flagged = []
        for layer in self._layers():
            for loss, unconditional in layer._book.losses:
                value = loss() if callable(loss) else loss
                if value is not None:
                    flagged.append((value, unconditional))
        return flagged

    def add_loss(self, losses: Any, inputs: Any = None) -> None:
        """Add losses: tensors, or functions of nothing that return one.

        In a v1 graph they also go to the collection REGULARIZATION_LOSSES.

        Args:
            losses: One, or a list.
            inputs: None if they hold for every input (such as penalties on variables), anything else if they depend
                on the inputs of a call.
        """
        for loss in tf.nest.flatten(losses):
            if loss is None:
                continue
            value = loss
            if not tf.executing_eagerly():
                value = loss() if callable(loss) else tf.convert_to_tensor(loss)
                if value is None:
                    continue
                _collect([value], v1.GraphKeys.REGULARIZATION_LOSSES)
            # A tensor of a function that is being traced cannot stand for the penalty of a variable, which outlives it.
            lasting = callable(loss) and (v1.executing_eagerly_outside_functions() or tf.inside_function())
            self._book.losses.append((loss if lasting else value, inputs is None))

    def get_losses_for(self, inputs: Any) -> list[Any]:
        """List the losses that depend on `inputs`, or with None those that depend on no input."""
        if inputs is None:
            return [loss for loss, unconditional in self._flagged_losses() if unconditional]
        conditional = [loss for loss, unconditional in self._flagged_losses() if not unconditional]
        return _depending(conditional, inputs)

    @property
    def updates(self) -> list[Any]:
        """Update operations of the layer in a graph; empty eagerly, and when the layer is not trainable."""
        return [update for update, _ in self._recorded_updates()]

    def _recorded_updates(self) -> list[tuple[Any, list[Any]]]:
        if not self.trainable:
            return []
        return [record for layer in self._layers() if layer.trainable for record in layer._book.updates]

    def add_update(self, updates: Any) -> None:
        """Record update operations; eagerly they have been run, and nothing is recorded."""
        if tf.executing_eagerly():
            return
        inputs = _call_inputs.get()
        if v1.executing_eagerly_outside_functions():
            # A function that is traced anew leaves its operations behind; only those of the last graph are of use.
            graph = v1.get_default_graph()
            self._book.updates = [record for record in self._book.updates if record[0].graph is graph]
        for update in tf.nest.flatten(updates):
            self._book.updates.append((getattr(update, "op", update), inputs))

    def get_updates_for(self, inputs: Any) -> list[Any]:
        """List the update operations that depend on `inputs`, or with None those that depend on no input."""
        conditional: list[Any] = []
        unconditional: list[Any] = []
        for update, call_inputs in self._recorded_updates():
            (conditional if _depending([update], call_inputs) else unconditional).append(update)
        return unconditional if inputs is None else _depending(conditional, inputs)

    # Building and calling.

    def build(self, input_shape: Any) -> None:
        """Make the variables for inputs of a shape. Subclasses override it."""
        self.built = True

    def call(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute the output. Subclasses override it."""
        return inputs

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The shape of the output for inputs of a shape."""
        return input_shape

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Build the layer if need be, and apply it.

        Args:
            inputs: A tensor, or whatever converts to one, or a structure of them.
            *args: Passed to `call`.
            **kwargs: Passed to `call`; ``scope``, a variable scope to build in.

        Returns:
            What `call` returns.
        """
        inputs = tf.nest.map_structure(tf.convert_to_tensor, inputs)
        self._set_scope(kwargs.pop("scope", None))
        with self._entered():
            if not self.built:
                if self._compute_dtype is None:
                    self._set_dtype(tf.nest.flatten(inputs)[0].dtype)
                self.build(tf.nest.map_structure(lambda tensor: tensor.shape, inputs))
                self.built = True
            if self._initial_weights is not None:
                values, self._initial_weights = self._initial_weights, None
                self.set_weights(values)
            if v1.executing_eagerly_outside_functions():  # losses of an earlier call are history
                self._book.losses = [record for record in self._book.losses if record[1]]
            token = _call_inputs.set(tf.nest.flatten(inputs))
            try:
                outputs = self.call(inputs, *args, **kwargs)
                if self._activity_regularizer is not None:
                    for output in tf.nest.flatten(outputs):
                        loss = self._activity_regularizer(output)
                        self.add_loss(loss / tf.cast(tf.shape(output)[0], loss.dtype), inputs)
            finally:
                _call_inputs.reset(token)
        if not tf.executing_eagerly():
            _collect(self.updates, v1.GraphKeys.UPDATE_OPS)
        return outputs

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """The same as calling the layer."""
        return self(*args, **kwargs)

    def _set_scope(self, scope: Any) -> None:
        if self._scope is not None:
            return
        if self._reuse:
            opened = v1.variable_scope(scope if scope is not None else self._base_name)
        elif scope is None and v1.executing_eagerly_outside_functions() and tf.distribute.has_strategy():
            # Eagerly every layer has variables of its own, whatever its name. But strategies keep variables by name
            # even then, and would let layers of one name share them, or clash.
            _replicated[self._base_name] += 1
            opened = v1.variable_scope(f"{self._base_name}.{_replicated[self._base_name]}")
        else:
            opened = v1.variable_scope(scope, default_name=self._base_name)
        with opened as self._scope:
            pass

    def _entered(self) -> Any:
        return _Entered(self._scope, self.built or self._reuse)

    # Configuration.

    def get_config(self) -> dict[str, Any]:
        """The arguments from which `from_config` makes the same layer anew, without its variables."""
        return {"name": self._name, "trainable": self.trainable, "dtype": self._dtype}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Make a layer from the configuration of another."""
        return cls(**config)


class _Entered:
    """The variable scope of a layer with its name scope."""

    def __init__(self, scope: Any, reuse: Any) -> None:
        self._variable_scope = v1.variable_scope(scope, reuse=reuse, auxiliary_name_scope=False)

    def __enter__(self) -> Any:
        scope = self._variable_scope.__enter__()
        self._name_scope = tf.name_scope(scope.original_name_scope)
        self._name_scope.__enter__()
        return scope

    def __exit__(self, *error: Any) -> None:
        self._name_scope.__exit__(*error)
        self._variable_scope.__exit__(*error)


_names_in_use: weakref.WeakKeyDictionary[Any, collections.Counter[str]] = weakref.WeakKeyDictionary()
_replicated: collections.Counter[str] = collections.Counter()


def _unique_name(base: str) -> str:
    """Number the layers of a graph from 1, as the original did."""
    used = _names_in_use.setdefault(v1.get_default_graph(), collections.Counter())
    used[base] += 1
    return f"{base}_{used[base]}"


def _snake_case(name: str) -> str:
    return re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", re.sub(r"(.)([A-Z][a-z0-9]+)", r"\1_\2", name)).lower()


def _parts(variable: Any) -> list[Any]:
    """The parts of a partitioned variable, or the variable itself."""
    return list(variable) if hasattr(variable, "as_tensor") else [variable]


def _penalty(name: str, regularizer: Callable[[Any], Any], variable: Any) -> Callable[[], Any]:
    def penalty() -> Any:
        with tf.name_scope(f"{name}/Regularizer"):
            return regularizer(variable)

    return penalty


def _collect(elements: Sequence[Any], collection: str) -> None:
    collected = v1.get_collection_ref(collection)
    present = {id(element) for element in collected}
    collected.extend(element for element in elements if id(element) not in present)


def _depending(results: Sequence[Any], inputs: Any) -> list[Any]:
    """The tensors and operations among `results` that any of `inputs` leads to; eagerly, where nothing tells, all."""
    if tf.executing_eagerly():
        return list(results)
    sources = {id(tensor) for tensor in tf.nest.flatten(inputs)}
    found = []
    for result in results:
        pending = [getattr(result, "op", result)]
        visited = set()
        while pending:
            operation = pending.pop()
            if operation in visited:
                continue
            visited.add(operation)
            if any(id(tensor) in sources for tensor in operation.inputs):
                found.append(result)
                break
            pending.extend(tensor.op for tensor in operation.inputs)
            pending.extend(operation.control_inputs)
    return found
