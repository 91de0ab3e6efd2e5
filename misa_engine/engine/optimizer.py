"""MISA: the torch optimizer that trains a few matrices at a time.

    round start   tracker draws the active units -> arena binds their slots, requires_grad on
    micro-batch   as each active gradient arrives, a hook moves it into its slot; p.grad becomes a view of the slot
    step          norm and skip flag on the device, then one fused launch over the arena
    round end     one device-to-host copy of the round's norms -> tracker -> next round

Nothing between two round ends waits for the device.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from misa_engine.engine import guards, state
from misa_engine.engine.active_set import ActiveSet
from misa_engine.engine.arrangement import arrangement
from misa_engine.engine.attendance import Attendance, GraphAnchor
from misa_engine.engine.buffers import buffers_for
from misa_engine.engine.events import CallbackHandle, SwitchEvent, describe_switch
from misa_engine.engine.gradients import Scaler
from misa_engine.engine.groups import build_groups
from misa_engine.engine.intake import intake_for
from misa_engine.engine.marks import phase
from misa_engine.engine.replicas import Replicas, built_together
from misa_engine.engine.residents import card_bytes, residents_of
from misa_engine.engine.rest import RestRule, can_rest
from misa_engine.kernels.backend import choose_backend
from misa_engine.method.config import MisaConfig
from misa_engine.method.partition import Partition, check_budget, partition_for
from misa_engine.method.sampling import ImportanceTracker, static_weights


class MISA(torch.optim.Optimizer):
    """Adam on a changing, importance-sampled set of weight matrices (arXiv 2511.00056, Algorithm 1).

    Every T steps a few units, together at most a share δ of the model, are drawn with probabilities that follow their
    tracked gradient norms, and train for T steps. Every other matrix has no state: it moves by the ``rest`` rule as its
    gradient passes by, or is frozen (``rest="none"``, as in the paper). Build it before freezing anything and on the
    device where the model will train.

    Example:
        >>> optimizer = MISA(model, lr=1e-5, delta=0.03)
        >>> for batch in loader:
        ...     model(**batch).loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()

    Args:
        model: any ``nn.Module`` of a known family, or one whose repeated layers can be recognised.
        config: all options as one object, or
        **options: the fields of ``MisaConfig`` by name.

    Attributes:
        units: tuple of ``Unit`` (name, numel, layer, kind), everything that can be drawn.
        partition: where every parameter of the model belongs.
        budget: floor(δ·N), parameters that the active units may hold together.
        inner_step: steps made in the present round, 0 … T-1.
        total_steps: steps made since the beginning.
        backend: "triton" or "reference", whichever updates the weights.
        events: the last 200 switches, as ``SwitchEvent``; ``on_switch`` sees all.
        replicas: the processes that train this model together (rank, size, exchanged_bytes); None in one process.
        skipped_steps: steps skipped because of a non-finite gradient, as of the last switch.
        empty_steps: steps in which no active parameter received a gradient, because their layers were skipped.

    Raises:
        ValueError: a bad option, a model that cannot be trained this way (see ``misa_engine.engine.guards``), or a
            budget smaller than the largest unit. Nothing has been changed then.
    """

    replicas: Replicas | None
    #: GradScaler then leaves unscaling and skipping to ``step``.
    _step_supports_amp_scaling = True

    @built_together
    def __init__(self, model: nn.Module, config: MisaConfig | None = None, **options: Any):
        self._residents = residents = residents_of(model)
        config = guards.one_config(config, options)
        guards.check_model(model, residents.on_host if residents else ())
        config, self._mesh, self.replicas = arrangement(model, config, residents, self.replicas)
        self.config = config
        self.partition: Partition = partition_for(model, config)
        self.units, self.budget = self.partition.units, check_budget(self.partition, config.delta)
        named = dict(model.named_parameters())
        sampled = [name for unit in self.units for name in unit.params]
        self._always = self.partition.always
        resting = can_rest(model, self.partition, config)
        self._parameters = {name: named[name] for name in dict.fromkeys((*self._always, *sampled, *resting))}
        self.dtype = guards.common_dtype(self._parameters)
        guards.check_sparse(model, self._parameters)
        self.backend = choose_backend(config.backend, (residents or named[sampled[0]]).device)
        groups, group_of = build_groups(model, self._parameters, config)
        if self.replicas is not None:
            self.replicas.agree(model, config)
        super().__init__(groups, {name: getattr(config, name) for name in ("lr", "betas", "eps", "weight_decay")})
        if residents is not None:
            residents.wake(self._always, self._parameters)
        held = (config, self._parameters, sampled, self._always, self.budget, len(groups), self.backend)
        self.arena, self.host, self._kernels = buffers_for(*held, self._mesh, self.replicas, residents)
        numels, weights = [unit.numel for unit in self.units], static_weights(self.units, config.static_weights)
        self.tracker = ImportanceTracker(numels, self.budget, config, weights)

        self.inner_step = self.total_steps = self.skipped_steps = self.empty_steps = 0
        self.events: deque[SwitchEvent] = deque(maxlen=200)  # 67 KB each for an 8B model's 224 units
        self._callbacks: list[Callable[[SwitchEvent], None]] = []
        self._model_bytes = card_bytes(model)

        guards.announce(model, self.partition.new, config)
        self._attach(model, group_of, resting)
        self._open_round({}, started=time.perf_counter())

    def _attach(self, model: nn.Module, group_of: dict[str, int], resting: Sequence[str]) -> None:
        """Put the hooks on the model, then freeze it: a frozen parameter takes none, and they survive the toggling."""
        config, kernels = self.config, self._kernels
        self._model = model
        self._guard = guards.CheckpointingGuard(model)
        where = (model, self._parameters, self.arena, kernels, lambda: self.param_groups)
        self._intake = intake_for(config, *where, self.replicas, lambda: self.total_steps, self._mesh)
        self._attendance = Attendance(model, self._intake.places, self._intake.empty_pass)
        self._intake.on_arrival = self._attendance.arrived
        self._rest: RestRule | None = None
        if resting:
            seen = (config, lambda: self.param_groups, self._intake.places, self._intake.exchange)
            self._rest = RestRule(model, resting, group_of, *seen, backend=self.backend)
            self._intake.on_inactive = self._rest.take
        self._anchor = GraphAnchor(model, self._attendance)
        seed = config.seed if config.leave_rounding == "stochastic" else None
        bound = (self._parameters, group_of, self.arena, self.host, self._intake)
        self._active_set = ActiveSet(*bound, rounding_seed=seed, backend=self.backend, residents=self._residents)
        parts = (config, self.partition, self.dtype, self.tracker, self.arena, kernels, self.host)
        self._parts = state.Parts(*parts, self._active_set, self._rest, self._mesh)
        model.requires_grad_(False)
        model.zero_grad(set_to_none=True)
        guards.claim(self._parameters.values())

    def __repr__(self) -> str:
        """Budget, clocks and active units."""
        shown = ("delta", "inner_steps", "preset", "rule")
        return (
            f"MISA({', '.join(f'{name}={getattr(self.config, name)!r}' for name in shown)}, backend={self.backend!r}: "
            f"budget of {self.budget:,} parameters for {len(self.units)} units; round {self.round}, step "
            f"{self.inner_step} of {self.tracker.round_length}, active: {', '.join(self.active)})"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Refuse to be pickled or copied: the hooks that feed it belong to one model."""
        raise TypeError(
            "a MISA cannot be pickled or copied, because its hooks sit on one model. Save optimizer.state_dict(), "
            "build MISA(model, ...) on the other model and load it there."
        )

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the units that train in the present round, in the order they were drawn."""
        return tuple(self.units[index].name for index in self.tracker.active)

    @property
    def scores(self) -> dict[str, float]:
        """G_u of each unit as the preset reads it, before normalisation and η; current as of the last switch."""
        return dict(zip((unit.name for unit in self.units), self.tracker.scores, strict=True))

    @property
    def probabilities(self) -> dict[str, float]:
        """Distribution of the next draw, before any forced choice; current as of the last switch."""
        return dict(zip((unit.name for unit in self.units), self.tracker.probabilities, strict=True))

    @property
    def round(self) -> int:
        """Number of the present round, from 0; one-step rounds of the cold start count."""
        return self.tracker.round

    @property
    def grad_norm(self) -> Tensor:
        """Global norm of the active gradients before clipping, a float32 scalar on the device."""
        return self._kernels.control.grad_norm[0]

    @property
    def measure_on_arrival(self) -> bool:
        """Take each gradient's norm as it arrives, so that clipping by the caller cannot distort the scores.

        On from the start. Switch it off to save that pass when only MISA clips: ``max_grad_norm``, ``clip_grad_norm_``.
        Always on with ``update_in="backward"``, which needs the norm to know a gradient that is not finite.
        """
        return self._intake.measure_on_arrival

    @measure_on_arrival.setter
    def measure_on_arrival(self, value: bool) -> None:
        self._intake.measure_on_arrival = value

    @property
    def last_micro_batch(self) -> bool:
        """Whether the next forward and backward pass is the last of its step, as it is by default.

        Under accumulation set it to False before every pass but the last. With ``update_in="backward"`` gradients then
        add up in ``p.grad``, as ordinary tensors, until the last pass uses them; with a ``rest`` rule only the last
        pass makes gradients of what rests (the first, where nobody says). Several processes then average once a step.
        """
        return self._intake.last_micro_batch and (self._rest is None or self._rest.last_micro_batch)

    @last_micro_batch.setter
    def last_micro_batch(self, value: bool) -> None:
        self._intake.last_micro_batch = value
        if self._rest is not None:
            self._rest.last_micro_batch = value

    def memory(self) -> dict[str, int]:
        """Bytes by category: the model's weights and everything this optimizer holds (host memory named as such)."""
        rest = {} if self._rest is None else {"rest": self._rest.nbytes}
        residents = {} if self._residents is None else self._residents.bytes()
        return {"weights": self._model_bytes, **residents, **self.arena.bytes(), **rest, **self.host.bytes()}

    def on_switch(self, callback: Callable[[SwitchEvent], None]) -> CallbackHandle:
        """Call ``callback(event)`` after each switch; the returned handle's ``remove()`` stops that."""
        self._callbacks.append(callback)
        return CallbackHandle(self._callbacks, callback)

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip the global gradient norm inside the next ``step()``, without touching the gradients.

        Costs one pass over the active gradients instead of the two and a half of ``torch.nn.utils.clip_grad_norm_``,
        and scores stay those of the raw gradients.

        Args:
            max_norm: as in torch; ``inf`` measures without clipping.

        Returns:
            The norm before clipping, a float32 scalar on the device.

        Raises:
            ValueError: a finite bound with ``update_in="backward"``, where the updates have been made by then.
        """
        self._intake.clip(max_norm)
        return self._kernels.global_norm().clone()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the active matrices; at the end of the T-th step of a round, draw the next ones.

        With ``update_in="backward"`` the updates were made as the gradients arrived, and this ends the step.

        Args:
            closure: re-evaluates the model and returns the loss, as in every torch optimizer.

        Raises:
            ValueError: a parameter was moved, replaced or reshaped since construction; a round is over in which an
                active parameter ran and never received a gradient; or a GradScaler with rest="sgd".
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._intake.settle("step()")
        with phase("update"):
            ends_round = self.inner_step + 1 >= self.tracker.round_length
            if ends_round:  # any unit may come next, so all have to be in their places before anything is written
                self._intake.places.check_all()
            self._active_set.drop_stale_bits()
            self._intake.step(Scaler.of(self, self.config.rest))
            self._active_set.know_weights()
            if self.replicas is not None:
                self.replicas.after_load(self._model, self.arena, [self.round, *self._clocks(), *self.active])
            self._attendance.count(self._intake.present)
            self.empty_steps += not any(self._intake.present)
            self.total_steps += 1
            self.inner_step += 1
            if ends_round:
                self._attendance.check()
                self._switch()
            elif self._rest is not None:
                self._rest.begin_step(self.total_steps)
        return loss

    @torch.no_grad()
    def end_round(self) -> None:
        """End the present round now instead of after its T steps: scores, closing step and draw as ever.

        To be called between two steps; gradients that have arrived since the last one are dropped. For schedules of
        one's own, and for benchmarks that time a switch.

        Raises:
            ValueError: a parameter was moved, replaced or reshaped since construction; nothing has been changed then.
        """
        self._intake.settle("end_round()")
        self._intake.places.check_all()
        self._switch()

    def _switch(self) -> None:
        """Close the round (line 16, scores), draw the next one and move its units in."""
        with phase("switch"):
            steps = self._close_round()
            self._open_round(steps, started=time.perf_counter())

    def _close_round(self) -> dict[str, int]:
        """Account for the round that ends. Returns each bound parameter's number of Adam steps."""
        if self.config.closing_momentum:  # line 16 is for what is about to be cleared
            self._active_set.drop_stale_bits()
            self._kernels.closing_step(spared=len(self._always))
            self._active_set.know_weights()
        report = self._kernels.report()
        self.skipped_steps = report.skipped
        slots = [[self._intake.slot_of[name] for name in self.units[index].params] for index in self.tracker.active]
        with phase("switch (sampler)"):
            self.tracker.update(
                [sum(report.sums[slot] for slot in unit) for unit in slots],
                [max(report.measured[slot] for slot in unit) for unit in slots],
            )
            if self._rest is not None:
                self._rest.observe(self.tracker, self.units, self._attendance.repeated)
        return dict(zip(self.arena.names, report.steps, strict=True))

    def _open_round(self, steps: dict[str, int], started: float) -> None:
        """Draw the next units and move them in.

        ``steps``: Adam steps of the parameters bound so far (none at construction); ``started``: when the switch began.
        """
        before = self.active
        with phase("switch (sampler)"):
            self.tracker.draw()
        if self.replicas is not None:
            self.replicas.at_switch(self.round, self.active, self._model)
        wanted = [*self._always, *(name for index in self.tracker.active for name in self.units[index].params)]
        fresh = wanted[len(self._always) :] if self.config.revisit == "clear" else []
        moved = self._active_set.change(wanted, steps, self.round, fresh)
        missed = self._attendance.without_gradient
        self._bind_round()
        self.inner_step = 0
        event = describe_switch(
            self.units,
            self.tracker,
            self.partition.total,
            before,
            step=self.total_steps,
            milliseconds=1e3 * (time.perf_counter() - started),
            moved_bytes=moved,
            skipped_steps=self.skipped_steps,
            empty_steps=self.empty_steps,
            without_gradient=missed,
        )
        self.events.append(event)
        for callback in list(self._callbacks):
            callback(event)

    def state_dict(self) -> dict[str, Any]:
        """Everything an exact continuation needs: torch's own part plus moments, residual bits, scores and clocks.

        Tensors are references to the live buffers, as in every torch optimizer; ``torch.save`` or a deep copy makes
        them a snapshot. Loads with ``torch.load(weights_only=True)``. Where several processes hold parts of it, all of
        them call this (``replicas.state_in_parts``).
        """
        self._active_set.drop_stale_bits()
        return {**super().state_dict(), "misa": state.pack(self._parts, self._clocks())}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken, anywhere in a round. The model's weights are loaded separately.

        Raises:
            ValueError: the state is another optimizer's, or of another model, δ, granularity, preset or option of the
                sampler; the message lists what differs. Nothing has been changed then.
        """
        self._intake.settle("load_state_dict()")
        state_dict = state.checked(self._parts, self.param_groups, state_dict)
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "misa"})
        clocks = state.unpack(self._parts, self._clocks(), state_dict["misa"])
        self.inner_step, self.total_steps, self.skipped_steps, self.empty_steps = clocks
        if self.replicas is not None:
            self.replicas.state_loaded([self.round, *self._clocks(), *self.active])
        self._bind_round()

    def _bind_round(self) -> None:
        self._attendance.bind(self.arena.names)
        if self._rest is not None:
            self._rest.bind(self.arena.names)
            self._rest.begin_step(self.total_steps)

    def _clocks(self) -> state.Clocks:
        return state.Clocks(self.inner_step, self.total_steps, self.skipped_steps, self.empty_steps)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only for torch's own use during construction; groups come from ``parameter_groups=[{"pattern": ...}]``."""
        if hasattr(self, "arena"):
            raise ValueError(
                "parameters cannot be added to MISA after construction; build it with always_train=(...) or "
                "parameter_groups=[{'pattern': ..., 'lr': ...}] instead"
            )
        super().add_param_group(param_group)

    def remove(self) -> None:
        """Take all hooks off the model and make every parameter trainable again, as before construction."""
        for hooks in (self._guard, self._anchor, self._attendance, self._intake):
            hooks.remove()
        self._active_set.release()
        guards.release(self._parameters.values())
        self._model.requires_grad_(True)
