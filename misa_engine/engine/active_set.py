"""ActiveSet: the parameters that hold a slot and train, and what happens when one leaves or comes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import nn
from torch.autograd.graph import increment_version

from misa_engine.engine.arena import Arena
from misa_engine.engine.gradients import GradientIntake
from misa_engine.engine.host import HostStore
from misa_engine.engine.residents import Residents
from misa_engine.kernels.split_float import round_stochastic_, seed_of


class ActiveSet:
    """Binds parameters to the arena and makes exactly these trainable.

    Args:
        parameters: name -> parameter, everything that can be bound.
        groups: name -> row of the hyperparameter table.
        arena: the slots.
        host: what is kept of parameters that left.
        intake: takes the gradients of those that are bound.
        rounding_seed: round the residual bits of a parameter that leaves stochastically, by this seed; None leaves the
            model's own bfloat16 weight, which is the master rounded to nearest.
        backend: "triton" or "reference".
        residents: matrices that rest outside the device's memory while they are not bound.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        groups: Mapping[str, int],
        arena: Arena,
        host: HostStore,
        intake: GradientIntake,
        *,
        rounding_seed: int | None,
        backend: str,
        residents: Residents | None = None,
    ):
        self._parameters, self._groups = parameters, groups
        self._arena, self._host, self._intake = arena, host, intake
        self._rounding_seed, self._backend, self._residents = rounding_seed, backend, residents

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters that are bound, by slot."""
        return tuple(self._arena.names)

    def numel(self, name: str) -> int:
        """Elements of a parameter whose state this process keeps; KeyError for one that can never be bound."""
        return self._arena.part(self._parameters[name]).numel()

    def drop_stale_bits(self) -> None:
        """Clear the residual bits of weights that somebody else wrote in place: they extend values that are gone.

        To be called before bits are read or saved, and followed by ``know_weights`` once weights were written.
        """
        for name in self._intake.places.edited((*self.names, *self._host.names)):
            if name in self._host.names:
                self._host.drop_residual(name)
            else:
                self._arena.drop_residual(self._arena.names.index(name))
        self.know_weights()

    def forget_weights(self) -> None:
        """Take the weights that are found at the next step for those that the residual bits extend."""
        self._intake.places.forget()

    def know_weights(self) -> None:
        """Take the weights as they are for those that the residual bits extend."""
        self._intake.places.know((*self.names, *self._host.names))

    def change(self, wanted: Sequence[str], steps: Mapping[str, int], round: int, fresh: Collection[str] = ()) -> int:
        """Bind ``wanted`` instead of what is bound now.

        Args:
            wanted: parameters of the next round, in the order wanted for newcomers.
            steps: name -> Adam steps of those bound so far.
            round: number of the round that begins; with the seed it decides how residual bits are rounded.
            fresh: parameters whose moments are cleared even if they stay.

        Returns:
            Bytes moved between the arena and the host.
        """
        self.drop_stale_bits()
        staying = set(wanted)
        moved = sum(self._leave(name, steps[name], round) for name in self.names if name not in staying)
        moved += self.bind(wanted, {name: steps[name] for name in self.names if name in staying and name not in fresh})
        moved += sum(self._host.enter(name, index) for index, name in enumerate(self.names))
        self.know_weights()
        return moved

    def bind(self, names: Sequence[str], steps: Mapping[str, int], starts: Sequence[int] | None = None) -> int:
        """Give ``names`` their slots, make them trainable, freeze the others and forget all gradients.

        What rests outside the device is brought there, and what leaves goes back to rest with its present weight.

        Args:
            names: the parameters, in the order wanted for newcomers.
            steps: name -> Adam steps of those that keep their moments.
            starts: fixed places (a checkpoint's); the caller then fills in the contents.

        Returns:
            Bytes of weights moved between host and device.
        """
        kept, before = set(names), self.names
        for name in before:
            self._parameters[name].grad = None
            if name not in kept:
                self._freeze(name)
        residents = self._residents
        # a checkpoint's places are filled in from the masters, whoever lay there before
        moved = 0 if residents is None else residents.leave(n for n in before if n not in kept or starts is not None)
        bound = {name: self._parameters[name] for name in names}
        self._arena.bind(
            bound, self._groups, steps, starts=starts, settle=None if residents is None else residents.enter
        )
        self._intake.bind()
        if residents is not None:
            self._intake.places.moved({*before, *names})
            moved += sum(bound[name].nbytes for name in names if name in residents and name not in before)
            residents.finish()
        for name in names:
            self._parameters[name].requires_grad_(True)
        return moved

    def release(self) -> None:
        """Forget all gradients and everything that was set on the parameters; what can rest does."""
        for name in self.names:
            self._freeze(name)
        if self._residents is not None:
            self._residents.leave(self.names)
            self._residents.finish()

    def _leave(self, name: str, steps: int, round: int) -> int:
        """Give up, or keep on the host, what belongs to a parameter. Returns bytes copied there."""
        index = self._arena.names.index(name)
        slot = self._arena.slots[index]
        if self._arena.residual is not None and self._rounding_seed is not None:
            bits = self._arena.residual[slot.start : slot.start + slot.numel]
            # one stream of random bits for each (seed, round, parameter)
            seed = seed_of(self._rounding_seed, round, name)
            first = self._arena.first(self._parameters[name])
            round_stochastic_(slot.weight, bits, seed, backend=self._backend, first_index=first)
            increment_version([slot.weight])  # for graphs that hold it, as after an update
            self._arena.spread([index])
        return self._host.leave(name, index, steps)

    def _freeze(self, name: str) -> None:
        parameter = self._parameters[name]
        parameter.requires_grad_(False)
        parameter.grad = None
        parameter.grad_dtype = parameter.dtype
