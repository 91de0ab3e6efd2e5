"""Residents: all matrices of a model that can rest, the workspace they share, and where the rest of the model lies."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from misa_engine.engine.gemm_gradients import stores_transposed
from misa_engine.engine.residents.lookup import HostLookup, host_embedding
from misa_engine.engine.residents.masters import Masters
from misa_engine.engine.residents.matrix import Card, Resting
from misa_engine.engine.residents.staying import let_go, stay_in_place
from misa_engine.engine.shards import is_sharded, local
from misa_engine.kernels.backend import choose_backend
from misa_engine.kernels.resident8 import format_named
from misa_engine.method.partition import partition

#: root module -> its residents, while it lives.
_residents: weakref.WeakKeyDictionary[nn.Module, Residents] = weakref.WeakKeyDictionary()


def residents_of(model: nn.Module) -> Residents | None:
    """The residents of ``model``, wrapped or not; None for a model without, and for what is no model."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return next((found for module in modules if (found := _residents.get(module)) is not None), None)


def linear_modules(model: nn.Module, family: str | None = None) -> tuple[dict[str, list[nn.Module]], dict[str, str]]:
    """Which matrices can rest, from names and shapes alone (also on the meta device).

    Args:
        model: the model.
        family: row of ``misa_engine.method.families.FAMILIES``; None recognises the family.

    Returns:
        Name -> the linear layers that multiply with it, for those that can; name -> why not, for all other matrices.

    Raises:
        ValueError: the model has no repeated layers (see ``misa_engine.method.partition``).
    """
    inside = {name for unit in partition(model, "module", family=family).units for name in unit.params}
    owners = owners_of(model)
    can: dict[str, list[nn.Module]] = {}
    stay: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        modules = [module for module, _ in owners[id(parameter)]]
        if name not in inside:
            stay[name] = "outside the layers"
        elif parameter.ndim != 2:
            stay[name] = f"{parameter.ndim}-dimensional"
        elif not all(_multiplies(module, parameter) for module in modules):
            stay[name] = f"in {type(modules[0]).__name__}, not nn.Linear"
        else:
            can[name] = modules
    return can, stay


def owners_of(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Id of a parameter -> the modules that have it, and under which name."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, leaf))
    return owners


def _multiplies(module: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether the module uses this weight in nn.Linear's own forward and nowhere else."""
    return (
        getattr(module, "weight", None) is parameter
        and stores_transposed(module) is False
        and "forward" not in module.__dict__  # accelerate's offloading
        and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)  # attention reads its weight
        and not hasattr(module, "parametrizations")
    )


class Residents:
    """The resting matrices of one model.

    Construction allocates the 8 bits of nothing but the workspace; each matrix rests from ``hold`` on, one after the
    other, so that neither card nor host ever has a second copy of the model. The model may be on the meta device.

    Args:
        model: the model. Its linear layers keep their parameters; only ``forward`` of those that rest is replaced.
        format: of ``misa_engine.kernels.resident8.FORMATS``: "int8", "int8_row" or "fp8".
        device: the card (or the CPU), where everything that does not rest lies.
        masters: where exact weights lie, "pinned" or "mapped" (see ``masters.py``).
        family: row of FAMILIES; None recognises the family.
        backend: "auto", "triton" or "reference".

    Attributes:
        names: the matrices that can rest, in the model's order.
        staying: name -> reason, of all other matrices; they stay in full on the card, as do norms and biases.
        workspace: (elements of the largest matrix,) in the dtype of the weights.

    Raises:
        ValueError: an unknown format or place, nothing that can rest, dtypes that differ, sharded weights, or a model
            with residents.
    """

    def __init__(
        self,
        model: nn.Module,
        format: str = "int8",
        device: torch.device | str | None = None,
        *,
        masters: str = "pinned",
        family: str | None = None,
        backend: str = "auto",
    ):
        if residents_of(model) is not None:
            raise ValueError("the model has residents already; release() them first, or load it anew.")
        if any(is_sharded(parameter) for parameter in model.parameters()):
            raise ValueError(
                "the model's weights are sharded over processes (fully_shard), and masters on the host are not. "
                "Leave out one of the two; replicas, a whole model in each process, can have residents."
            )
        self.format = format_named(format)
        modules, self.staying = linear_modules(model, family)
        parameters = dict(model.named_parameters())
        if not modules:
            raise ValueError(
                f"no matrix of {type(model).__name__} can rest in 8 bits: {_reasons(self.staying)}. Train it without "
                "residents."
            )
        dtypes = {parameters[name].dtype for name in modules}
        if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.bfloat16}:
            raise ValueError(
                "matrices that rest are float32 or bfloat16, all of them one; got "
                f"{', '.join(sorted(map(str, dtypes)))}. Load the model in bfloat16 (dtype=torch.bfloat16)."
            )
        self.device = _indexed(device if device is not None else next(iter(parameters.values())).device)
        self.dtype = dtypes.pop()
        # the meta device counts bytes and computes nothing
        self.backend = "reference" if self.device.type == "meta" else choose_backend(backend, self.device)
        self._masters = Masters(masters, self.device, [parameters[name].nbytes for name in modules])
        largest = max(parameters[name].numel() for name in modules)
        self.workspace = torch.empty(largest, dtype=self.dtype, device=self.device)
        card = Card(self.format, self.device, self.backend, self.workspace)
        self._matrices = {name: Resting(name, modules[name], parameters[name], card) for name in modules}
        self._model = weakref.ref(model)
        stay_in_place(model, self._matrices.values(), self.device, self.dtype)
        found = host_embedding(model)
        self._lookup = None if found is None else HostLookup(model, *found, self.device)
        self._written: torch.cuda.Event | None = None  # after the latest copies to masters
        _residents[model] = self

    @property
    def names(self) -> tuple[str, ...]:
        """Matrices that rest whenever they are not drawn."""
        return tuple(name for name, matrix in self._matrices.items() if not matrix.awake)

    def __contains__(self, name: object) -> bool:
        matrix = self._matrices.get(name) if isinstance(name, str) else None
        return matrix is not None and not matrix.awake

    @property
    def resting(self) -> tuple[str, ...]:
        """Matrices that rest at present."""
        return tuple(name for name, matrix in self._matrices.items() if matrix.resting)

    def matrix(self, name: str) -> Resting:
        """The record of a matrix; KeyError for one that cannot rest."""
        return self._matrices[name]

    def hold(self, name: str, weight: Tensor) -> None:
        """Put a matrix to rest; ``weight`` is its exact value and may become its master (see ``masters.py``).

        Args:
            name: one of ``names``.
            weight: (out, in) of the dtype of the weights, on any device.

        Raises:
            ValueError: shape or dtype differ from the parameter's.
        """
        matrix = self._matrices[name]
        if weight.shape != matrix.shape or weight.dtype != self.dtype:
            raise ValueError(
                f"{name} is {tuple(matrix.shape)} of {self.dtype}; got {tuple(weight.shape)} of {weight.dtype}"
            )
        master = self._masters.take(weight)
        if matrix.parameter.is_meta != master.is_meta:  # .data cannot change between these
            matrix.replace_parameter(master)
        matrix.hold(master)

    def enter(self, name: str, place: Tensor) -> None:
        """From now on ``name`` trains at ``place``; see ``Resting.enter``. What cannot rest is left where it is."""
        if name in self:
            self._matrices[name].enter(place)

    def leave(self, names: Iterable[str]) -> int:
        """Let those of ``names`` that train in the arena rest again. Returns bytes written to the host."""
        left = [self._matrices[name] for name in names if name in self and not self._matrices[name].resting]
        for matrix in left:
            matrix.leave()
        self._written = _event(self.device) if left else self._written
        return sum(matrix.numel * self.dtype.itemsize for matrix in left)

    @property
    def on_host(self) -> tuple[str, ...]:
        """Everything that lies on the host: what rests, and the embedding whose rows are looked up there."""
        return self.names if self._lookup is None else (self._lookup.name, *self.names)

    @torch.no_grad()
    def become(self, send: Callable[[Tensor], None]) -> tuple[str, ...]:
        """Let everything that lies on the host, and its 8 bits, become what ``send`` makes of it on the card.

        By way of the workspace. Only what differs is written: masters that are pages of a file stay so otherwise.

        Args:
            send: replaces a tensor on the card by that of another process, bit for bit.

        Returns:
            Names of what was written.
        """
        model = self._model()
        assert model is not None  # whoever asks holds it
        staging, written = self.workspace.view(torch.uint8), []
        for name in self.on_host:
            whole = model.get_parameter(name).detach().view(-1).view(torch.uint8)  # shares the parameter's version
            for part in whole.split(staging.numel()):
                staged = staging[: part.numel()].copy_(part)
                send(staged)
                if not torch.equal(sent := staged.cpu(), part):
                    part.copy_(sent)
                    written.append(name)
            if name in self:
                self._matrices[name].renew()
                for each in self._matrices[name].parts:  # those of an official FP8 checkpoint are the file's own
                    send(each.view(torch.uint8))
        return tuple(dict.fromkeys(written))

    def wake(self, names: Iterable[str], trained: Collection[str] = ()) -> None:
        """Make those of ``names`` that rest ordinary parameters on the card for good (``always_train``).

        The embedding comes to the card if it is among these or among what is ever ``trained``.
        """
        names = tuple(names)
        for name in names:
            if name in self:
                self._matrices[name].wake()
        if self._lookup is not None and self._lookup.name in {*names, *trained}:
            self._lookup.bring_back()
            self._lookup = None

    def finish(self) -> None:
        """Wait until all masters hold what was written to them, and for nothing that was queued after that."""
        if self._written is not None:
            self._written.synchronize()
            self._written = None

    def expanded(self, name: str) -> Tensor:
        """A copy (out, in) of what a resting matrix counts as, on the card, in the dtype of the weights."""
        return self._matrices[name].expand(self.dtype).clone()

    def bytes(self) -> dict[str, int]:
        """Bytes by category: on the card 8 bits, steps, workspace; and masters on the host."""
        packed = [matrix.packed for matrix in self._matrices.values() if matrix.packed is not None]
        masters = [matrix.master for matrix in self._matrices.values() if matrix.master is not None]
        lookup = {} if self._lookup is None else {"host_embedding": self._lookup.module.weight.nbytes}
        return {
            "resident_codes": sum(each.codes.nbytes for each in packed),
            "resident_steps": sum(each.steps.nbytes for each in packed),
            "resident_workspace": self.workspace.nbytes,
            "host_masters": sum(master.nbytes for master in masters),
            **lookup,
        }

    def describe(self) -> str:
        """What rests, what stays in full, and why, as lines of plain text."""
        sizes, names = self.bytes(), self.names
        elements = sum(self._matrices[name].numel for name in names)
        card = sizes["resident_codes"] + sizes["resident_steps"]
        lines = [
            f"{len(names)} matrices rest as {self.format.name}: {elements:,} weights in {card / 2**30:.2f} GiB on "
            f"{self.device}, workspace {sizes['resident_workspace'] / 2**20:.0f} MiB, exact masters "
            f"{sizes['host_masters'] / 2**30:.2f} GiB on the host ({self._masters.place})"
        ]
        reasons: dict[str, list[str]] = {}
        if self._lookup is not None:
            lines.append(f"rows are looked up on the host: {self._lookup.name}")
        for name, reason in self.staying.items():
            if self._lookup is not None and name == self._lookup.name:
                continue
            reasons.setdefault(reason, []).append(name)
        lines += [f"in full on {self.device}, {reason}: {', '.join(names)}" for reason, names in reasons.items()]
        return "\n".join(lines)

    def release(self) -> None:
        """Make an ordinary model of it, all of it on the card in full; for a model that fits.

        Raises:
            ValueError: an optimizer trains it; nothing has been changed then.
        """
        for name in self.names:
            self._matrices[name].check_not_training()
        self.wake(self.on_host)
        model = self._model()
        if model is not None:
            _residents.pop(model, None)
            let_go(model)


def rest(
    model: nn.Module,
    format: str = "int8",
    device: torch.device | str | None = None,
    *,
    masters: str = "pinned",
    family: str | None = None,
    backend: str = "auto",
) -> Residents:
    """Put every matrix of a loaded model that can rest into 8 bits, one after the other, and the others on the card.

    To be called before ``MISA(model, ...)``. Arguments and errors are those of ``Residents``.
    """
    residents = Residents(model, format, device, masters=masters, family=family, backend=backend)
    for name in residents.names:
        residents.hold(name, residents.matrix(name).parameter.detach())
    model.to(residents.device)
    return residents


def _event(device: torch.device) -> torch.cuda.Event | None:
    """One that happens when the device has done what is queued now; None where nothing is queued."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def _reasons(staying: Mapping[str, str]) -> str:
    return ", ".join(sorted(set(staying.values()))) or "it has none"


def _indexed(device: torch.device | str) -> torch.device:
    """The device as tensors name it: a GPU with its number, the CPU without the one that launchers give it."""
    return torch.empty(0, device=device).device


def resting_names(model: nn.Module) -> Collection[str]:
    """Names of the parameters whose exact weights lie on the host; none for a model without residents."""
    found = residents_of(model)
    return () if found is None else found.on_host


def card_bytes(model: nn.Module) -> int:
    """Bytes of the parameters that lie on the card in full and outside the arena; tied ones count once."""
    elsewhere = set(resting_names(model))
    return sum(local(parameter).nbytes for name, parameter in model.named_parameters() if name not in elsewhere)
