"""Plans: what to train on, the rows of the table, seeds, trainer and evaluation, as TOML.

A profile is a table ``[profile.NAME]`` with the same tables again; what it has replaces what the plan has.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Literal

from thresher.errors import UsageError, suggest
from thresher.io.sql import is_sql
from thresher.runtime.parameters import Share, build
from thresher.runtime.untrusted import cut, parse_toml, toml_text
from thresher.selection import Keep

if TYPE_CHECKING:
    from thresher.pruning.registry import Method

BASELINE, SHORT = "full", "full-short"
HALVES = ("selection", "held-out")
EARLY = "early-proxy"  # in a step: the pool of the early proxy
CLUSTERS = "clusters"  # concepts: clusters of the embeddings of the proxy
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._%+-]{0,59}")
_TABLES = ("name", "about", "paper", "seeds", "data", "trainer", "evaluation", "proxy", "corpus", "row", "profile")
_TABLE_OF = {"corpora": "corpus", "rows": "row"}  # where names in Python and in TOML differ
_INDEXED = {"key", "text"}  # columns that every corpus has apart from its embeddings
_MANY = 1_000_000  # rows, as long as those of a corpus are not known

Task = Literal["clip", "moco"]


def _check_name(what: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{what} name {cut(repr(name))}; it names a folder: give at most 60 letters, digits, . _ - + and %"
        )


def _same_names(names: Sequence[str]) -> str:
    """Return the names that are those of one file or folder, "" for none: some file systems do not know capitals."""
    plain = [name.casefold() for name in names]
    return ", ".join(sorted({name for name in names if plain.count(name.casefold()) > 1}))


def check_selection(path: str, where: str = "") -> None:
    """Raise a UsageError if a selection folder or file of keys does not exist; ``where`` says what names it."""
    if not is_sql(path) and "://" not in path and not os.path.exists(path):
        raise UsageError(f"{where}{path} does not exist; give a selection folder or a file of keys")


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The data of a plan; relative paths are below the folder that ``--data`` names.

    Attributes:
        train: The training data: anything that ``thresher train`` reads.
        evals: Evaluation sets, parquet, with different file names. Each is cut into two halves, with no group in both.
        off_topic: Data whose rows are added to a corpus as off-topic rows; "" for none.
    """

    train: str
    evals: tuple[str, ...]
    off_topic: str = ""

    def __post_init__(self) -> None:
        """Validate the parameters."""
        if not self.evals:
            raise UsageError("evals = []; give one evaluation set or more")
        names = [PurePath(path).stem for path in self.evals]
        if twice := _same_names(names):
            raise UsageError(f"two evaluation sets are named {twice}; give each file its own name")
        if PurePath(self.train) in map(PurePath, self.evals):
            raise UsageError(f"{self.train} is the training data and an evaluation set; give pairs that are held out")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What is done to the training data.

    Attributes:
        name: Its name in the table.
        swapped: Share of the rows of the data whose captions are passed on to each other (before copies are made).
        within: Column of classes: captions are passed on within a class only, which makes near misses.
        duplicated: Share of the rows that are copies of other rows, with small changes to the image.
        off_topic: Share of the rows that come from other data.
        rows: Use only this many rows of the training data, drawn at random; None for all.
        seed: Seed of the changes, the same for all runs.
    """

    name: str = "as-is"
    swapped: float = 0.0
    within: str | None = None
    duplicated: float = 0.0
    off_topic: float = 0.0
    rows: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Validate the parameters."""
        _check_name("corpus", self.name)
        for name in ("swapped", "duplicated", "off_topic"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name} = {getattr(self, name)}; give a share of 0 or more and below 1")
        if self.duplicated + self.off_topic >= 1:
            raise UsageError(
                f"duplicated = {self.duplicated}, off_topic = {self.off_topic}; together they must stay below 1"
            )
        if self.rows is not None and self.rows < 2:
            raise UsageError(f"rows = {self.rows}; give 2 or more")

    @property
    def changed(self) -> bool:
        """Whether the corpus differs from the training data, so that it is written to the output folder."""
        return bool(self.swapped or self.duplicated or self.off_topic or self.rows is not None)


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """How every run is trained; see :class:`thresher.train.loop.Schedule` and the settings of the two trainers.

    Attributes:
        task: "clip" or "moco".
        model: Name of the model.
        epochs: Length of full training in epochs.
        share: Samples that every row but full training sees, as a share of those of full training.
        batch_size: Rows of a batch.
        lr: Peak learning rate, None for the default of the model.
        weight_decay: Weight decay.
        warmup: Share of the run over which the learning rate rises.
        loss: "clip" or "siglip", for CLIP.
        chunk: Rows to process at once, for CLIP.
        side: Side of the images in pixels, for MoCo.
        version: 2 or 3, for MoCo.
        momentum: Momentum of the key encoder, for MoCo.
        queue: Keys in the queue, for MoCo v2.
        precision: Precision of matrix products.
        device: "auto", "cpu" or "cuda".
        threads: CPU threads of a run; part of the plan, because the last bits of a result depend on it.
        workers: Processes that read images which do not fit in memory.
        eval_every: Epochs between evaluations; 0 for only at the end.
        at_once: Runs at the same time; None for as many as fit the cores.
    """

    task: Task = "clip"
    model: str = "tiny"
    epochs: int = 14
    share: float = 0.7
    batch_size: int = 256
    lr: float | None = None
    weight_decay: float = 0.1
    warmup: float = 0.05
    loss: Literal["clip", "siglip"] = "clip"
    chunk: int | None = None
    side: int = 32
    version: int = 2
    momentum: float = 0.99
    queue: int | None = None
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "auto"
    threads: int = 1
    workers: int = 2
    eval_every: int = 0
    at_once: int | None = None

    def __post_init__(self) -> None:
        """Validate the parameters."""
        if self.epochs < 1 or self.threads < 1 or (self.at_once is not None and self.at_once < 1):
            raise UsageError(
                f"epochs = {self.epochs}, threads = {self.threads}, at_once = {self.at_once}; give 1 or more"
            )
        if not 0 < self.share <= 1:
            raise UsageError(f"share = {self.share}; give a share above 0 and at most 1")

    def samples(self, rows: int, share: float) -> int:
        """Return the samples of a run that sees a share of those of full training, a multiple of the batch size."""
        batch = min(self.batch_size, rows)
        full = self.epochs * (rows // batch) * batch
        return max(batch, round(share * full) // batch * batch)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How models are evaluated.

    Attributes:
        labels: Class columns of the evaluation sets; () for the usual names.
        group: Column that groups equivalent rows.
        templates: Prompts for class names, for CLIP.
    """

    labels: tuple[str, ...] = ()
    group: str | None = None
    templates: tuple[str, ...] = ("{}",)


@dataclass(frozen=True, kw_only=True)
class Proxy:
    """The model whose embeddings selections are made from: trained on the corpus itself, once per corpus.

    Attributes:
        epochs: Epochs it is trained for.
        early: Epochs of a second, early model, for the reducible score of c-rho; 0 for none.
        reference: Epochs of each of the two models that give reference losses, each trained on one half of the rows.
        encoder: An encoder to use instead, as ``thresher embed`` names them: help from outside, which the table says.
    """

    epochs: int = 4
    early: int = 0
    reference: int = 4
    encoder: str = ""

    def __post_init__(self) -> None:
        """Validate the parameters."""
        if self.epochs < 1 or self.early < 0 or self.reference < 1:
            raise UsageError(
                f"epochs = {self.epochs}, early = {self.early}, reference = {self.reference}; give 1 epoch or more "
                "(early: 0 or more)"
            )


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table: what it trains on.

    Attributes:
        name: Its name in the table.
        policy: The pruning policy.
        prune: Share of the samples of the run that the policy leaves out; None for its published defaults.
        options: Options of the policy, by field.
        steps: Methods that select rows before training, each a table with ``method`` and its parameters. The value
            "early-proxy" of a parameter stands for the pool of the early proxy.
        pool: What the steps read: "proxy", the embeddings of the proxy, or "data", keys and captions only. None for
            "data" if no step needs more, else "proxy".
        coreset_of: Another row: train on the rows of the corpus that its run found least redundant.
        selection: A selection folder or a file of keys: train on these rows.
        loss: "drrho": a loss that takes the embeddings of the proxy as its reference; "" for the loss of the trainer.
        compose: "diversity" or "frequency": compose every batch by the concepts of its rows (CABS); "" for no.
        concepts: For ``compose``, "clusters" of the embeddings of the proxy, or "column:NAME".
        keep: How many rows the coreset keeps, or the last step; a list makes a row for each.
        share: Samples of the run, as a share of those of full training; None for the trainer's, and all for full.
        about: A remark below the table.
    """

    name: str
    policy: str = "full"
    prune: Share | None = None
    options: dict[str, Any] = field(default_factory=dict)
    steps: tuple[dict[str, Any], ...] = ()
    pool: Literal["proxy", "data"] | None = None
    coreset_of: str | None = None
    selection: str | None = None
    loss: Literal["", "drrho"] = ""
    compose: Literal["", "diversity", "frequency"] = ""
    concepts: str = CLUSTERS
    keep: str | None = None
    share: float | None = None
    about: str = ""

    def __post_init__(self) -> None:
        """Validate the parameters, the policy and the methods."""
        from thresher.dynamic.registry import POLICIES, check_options

        _check_name("row", self.name)
        if self.share is not None and not 0 < self.share <= 1:
            raise UsageError(f"row {self.name}: share = {self.share}; give a share above 0 and at most 1")
        if self.prune is not None and not 0 < self.prune < 1:
            raise UsageError(f"row {self.name}: prune = {self.prune}; give a share strictly between 0 and 1")
        if self.concepts != CLUSTERS and not (self.compose and self.concepts.startswith("column:")):
            raise UsageError(
                f"row {self.name}: concepts = {self.concepts!r}; give clusters or column:NAME, and compose"
            )
        steps = [self._step(table) for table in self.steps]
        if self.pool is None:
            object.__setattr__(self, "pool", _pool_of(steps))  # so that the value in use is recorded
        if self.selects:
            if self.policy != "full" or self.prune is not None or self.options:
                raise UsageError(f"row {self.name}: trains on a selection; leave out policy, prune and options")
            if sum(map(bool, (self.steps, self.coreset_of, self.selection))) > 1:
                raise UsageError(f"row {self.name}: give one of steps, coreset_of and selection")
            if self.keep is not None:
                Keep.parse(self.keep)
            return
        if self.keep is not None:
            raise UsageError(f"row {self.name}: keep is for rows with steps or coreset_of")
        check_options(self.policy, self.options, prune=self.prune)
        if self.compose and POLICIES.find(self.policy).chooses_batches:
            raise UsageError(f"row {self.name}: policy {self.policy} chooses batches itself; leave out compose")
        if POLICIES.find(self.policy).needs_selection:
            raise UsageError(f"row {self.name}: for policy {self.policy} give steps, coreset_of or selection instead")

    def _step(self, table: Any) -> Method:
        from thresher.pruning.registry import build as build_method

        if not isinstance(table, dict) or not isinstance(table.get("method"), str):
            raise UsageError(f'row {self.name}: a step is a table with method = "..."')
        return build_method(table["method"], {key: value for key, value in table.items() if key != "method"})

    @property
    def selects(self) -> bool:
        """Whether rows are selected before training."""
        return bool(self.steps or self.coreset_of or self.selection)

    @property
    def needs_reference(self) -> bool:
        """Whether the policy needs reference losses, which the plan computes unless the row names some."""
        from thresher.dynamic.registry import POLICIES

        return bool(POLICIES.find(self.policy).needs_references) and not self.options.get("reference")

    @property
    def needs_proxy(self) -> bool:
        """Whether the embeddings of the proxy are needed."""
        selects, composes = self.steps and self.pool == "proxy", self.compose and self.concepts == CLUSTERS
        return bool(selects or self.loss or composes)

    def share_of(self, trainer: Trainer) -> float:
        """Return the samples of its runs as a share of those of full training."""
        return self.share or (1.0 if self.name == BASELINE else trainer.share)

    def check_length(self, trainer: Trainer, rows: int) -> None:
        """Raise a UsageError if its policy cannot leave out ``prune`` in a run on so many rows."""
        from thresher.dynamic.registry import epochs_for, policy_named

        if self.selects:
            return
        options = {**self.options, "reference": "any"} if self.needs_reference else self.options
        try:
            samples = trainer.samples(rows, self.share_of(trainer))
            epochs = epochs_for(samples, rows, self.policy, prune=self.prune, options=options)
            policy_named(self.policy, epochs, prune=self.prune, options=options)
        except UsageError as error:
            raise UsageError(f"row {self.name}: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """An experiment.

    Attributes:
        name: Name of the plan.
        about: What it asks.
        paper: The numbers of papers next to which the table is shown.
        profile: The profile it was read with, "" for none.
        seeds: Seeds of the runs.
        data: Training data and evaluation sets.
        trainer: How every run is trained.
        evaluation: How every model is evaluated.
        proxy: The model that selections are made from.
        corpora: What is done to the training data.
        rows: The rows of the table, for every corpus.
    """

    name: str
    about: str = ""
    paper: str = ""
    profile: str = ""
    seeds: tuple[int, ...] = (0, 1, 2)
    data: Sources
    trainer: Trainer = Trainer()
    evaluation: Evaluation = Evaluation()
    proxy: Proxy = Proxy()
    corpora: tuple[Corpus, ...] = (Corpus(),)
    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        """Check that names are unique and that rows refer to rows."""
        _check_name("plan", self.name)
        for what, several, named in (("row", "rows", self.rows), ("corpus", "corpora", self.corpora)):
            if not named:
                raise UsageError(f"has no {what}; write [[{what}]]")
            if twice := _same_names([one.name for one in named]):
                raise UsageError(f"two {several} are named {twice}; give each its own name")
        known = {row.name: row for row in self.rows}
        for row in self.rows:
            if row.coreset_of is None:
                continue
            if row.coreset_of not in known:
                raise UsageError(
                    f"row {row.name}: no row {row.coreset_of!r} to make a coreset of.{suggest(row.coreset_of, known)}"
                )
            if known[row.coreset_of].selects or row.keep is None:
                raise UsageError(f"row {row.name}: give keep, and coreset_of a row with a policy")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UsageError(f"seeds = {list(self.seeds)}; give one or more, each once")
        if any(corpus.off_topic for corpus in self.corpora) and not self.data.off_topic:
            raise UsageError("a corpus has off_topic rows; name their data: off_topic in [data]")
        if self.trainer.task == "moco":
            if odd := [row.name for row in self.rows if row.loss]:
                raise UsageError(f"rows {', '.join(odd)}: the losses of MoCo take no reference; leave loss out")
            if odd := [row.name for row in self.rows if row.needs_proxy and not self.proxy.encoder]:
                raise UsageError(f"rows {', '.join(odd)}: for MoCo name an encoder in [proxy]")
            if odd := [row.name for row in self.rows if row.needs_reference]:
                raise UsageError(
                    f"rows {', '.join(odd)}: reference losses are those of CLIP; give the option reference"
                )
            if any(corpus.swapped for corpus in self.corpora):
                raise UsageError(
                    "MoCo does not read captions, so that swapping them changes nothing; leave swapped out"
                )

    def check_lengths(self, rows: int = _MANY) -> None:
        """Raise a UsageError if a policy cannot leave out its share in a run on so many rows."""
        for row in self.rows:
            row.check_length(self.trainer, rows)

    @classmethod
    def load(cls, name: str, profile: str | None = None) -> Plan:
        """Read a TOML file, or a plan that comes with thresher by its name.

        Args:
            name: Path of the file, or name of the plan.
            profile: A profile of the plan; None for the plan without one.

        Raises:
            UsageError: There is no such plan or profile, it is not valid TOML, or a value is not allowed.
        """
        shipped = shipped_plans()
        if name in shipped:
            return cls.parse(shipped[name], name, profile)
        try:
            with Path(name).open("rb") as file:
                text = toml_text(file)
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{name}: neither a readable file ({getattr(error, 'strerror', None) or error}) nor a plan that comes "
                f"with thresher: {', '.join(shipped)}.{suggest(name, shipped)}"
            ) from None
        return cls.parse(text, name, profile)

    def check_selections(self) -> None:
        """Raise a UsageError if a selection that a row names does not exist, before anything is trained."""
        for row in self.rows:
            if row.selection is not None:
                check_selection(row.selection, f"row {row.name}: ")

    @classmethod
    def parse(cls, text: str, origin: str = "plan", profile: str | None = None) -> Plan:
        """Read TOML text, see :meth:`load`."""
        try:
            data = parse_toml(text)
        except ValueError as error:
            raise UsageError(f"{origin}: not valid TOML ({error})") from None
        try:
            return cls._made(data, Path(origin).stem, profile)
        except UsageError as error:
            raise UsageError(f"{origin}: {cut(str(error), 1_000)}") from None

    @classmethod
    def _made(cls, data: dict[str, Any], name: str, profile: str | None) -> Plan:
        profiles = data.pop("profile", {})
        _check_table("profile", profiles)
        if profile is not None:
            if profile not in profiles:
                known = ", ".join(profiles) or "none"
                raise UsageError(f"has no profile {profile!r}; it has {known}.{suggest(profile, profiles)}")
            _check_table(f"profile.{profile}", profiles[profile])
            data = _merged(data, profiles[profile])
        for key in data:
            if key not in _TABLES:
                raise UsageError(f"unknown key {cut(repr(key))}; allowed: {', '.join(_TABLES)}.{suggest(key, _TABLES)}")
        if "data" not in data:
            raise UsageError('has no [data]; write train = "..." and evals = ["..."]')
        rows = [made for table in _tables("row", data.get("row", [])) for made in _rows(table)]
        corpora = [_built(Corpus, "corpus", table) for table in _tables("corpus", data.get("corpus", [{}]))]
        texts: dict[str, Any] = {key: str(data[key]) for key in ("about", "paper") if key in data}
        parts: dict[str, Any] = {
            key: _built(kind, f"[{key}]", data.get(key, {}))
            for key, kind in (("data", Sources), ("trainer", Trainer), ("evaluation", Evaluation), ("proxy", Proxy))
        }
        return cls(
            name=str(data.get("name", name)), profile=profile or "", seeds=seeds_of(data.get("seeds", 3)), **texts,
            **parts, corpora=tuple(corpora), rows=tuple(rows),
        )  # fmt: skip

    def narrowed(self, rows: Sequence[str] = (), corpora: Sequence[str] = (), seeds: int | None = None) -> Plan:
        """Return the plan with some of its rows and corpora, and another number of seeds.

        The row ``full`` always stays, and so does the row that a coreset is made of.

        Raises:
            UsageError: It has no such row or corpus.
        """
        for what, names, known in (
            ("row", rows, [row.name for row in self.rows]),
            ("corpus", corpora, [one.name for one in self.corpora]),
        ):
            if odd := [name for name in names if name not in known]:
                raise UsageError(
                    f"{self.name}: no {what} {odd[0]!r}; it has {', '.join(known)}.{suggest(odd[0], known)}"
                )
        wanted = {BASELINE, SHORT, *rows}
        wanted |= {row.coreset_of for row in self.rows if row.name in wanted and row.coreset_of}
        return replace(
            self,
            rows=tuple(row for row in self.rows if not rows or row.name in wanted),
            corpora=tuple(one for one in self.corpora if not corpora or one.name in corpora),
            seeds=self.seeds if seeds is None else seeds_of(seeds),
        )

    def record(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return asdict(self)

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Plan:
        """Return the plan of a :meth:`record` that was written as JSON, by this version or an older one.

        Raises:
            UsageError: A value is not allowed.
        """
        tables = {_TABLE_OF.get(name, name): value for name, value in record.items() if name != "profile"}
        return replace(cls._made(tables, "plan", None), profile=str(record.get("profile", "")))


def shipped_plans() -> dict[str, str]:
    """Return the text of every plan that comes with thresher, by name."""
    folder = resources.files("thresher.lab") / "plans"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".toml")), key=lambda f: f.name)
    return {file.name[:-5]: file.read_text(encoding="utf-8") for file in files}


def seeds_of(value: Any) -> tuple[int, ...]:
    """Return seeds: N for 0 to N - 1, or a list of them.

    Raises:
        UsageError: It is neither a number of 1 or more nor a list of numbers.
    """
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 1000:
        return tuple(range(value))
    if isinstance(value, list) and value and all(type(seed) is int and 0 <= seed < 2**31 for seed in value):
        return tuple(value)
    raise UsageError(f"seeds = {cut(repr(value))}; give how many, 1 or more, or a list of numbers from 0")


def _rows(table: dict[str, Any]) -> list[Row]:
    """Return the rows of a table: one, or one for each budget of ``keep``."""
    keep = table.get("keep")
    if not isinstance(keep, list):
        return [_row(table)]
    if not keep:
        raise UsageError(f"row {cut(str(table.get('name')))}: keep = []; give budgets, or leave it out")
    return [_row({**table, "name": f"{table.get('name')}-{one}", "keep": one}) for one in keep]


def _row(table: dict[str, Any]) -> Row:
    steps = table.get("steps")
    if isinstance(steps, list) and steps and table.get("keep") is not None and isinstance(steps[-1], dict):
        table = {**table, "steps": [*steps[:-1], {**steps[-1], "keep": table["keep"]}]}
    name = table.get("name")
    made: Row = _built(Row, f"row {cut(str(name))}" if name else "row", table)
    return made


def _pool_of(steps: Sequence[Method]) -> Literal["proxy", "data"]:
    """Return the pool that steps read: "data" if none needs more than its keys and captions."""
    from thresher.pruning.registry import only_columns

    known = [only_columns(step) for step in steps]
    return "data" if known and all(one is not None and _INDEXED.issuperset(one) for one in known) else "proxy"


def _built(cls: type[Any], what: str, table: Any) -> Any:
    _check_table(what, table)
    return build(cls, what, {key: tuple(v) if isinstance(v, list) else v for key, v in table.items()})


def _tables(what: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(table, dict) for table in value):
        raise UsageError(f"{what} is not a list of tables; write [[{what}]]")
    return value


def _check_table(what: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise UsageError(f"{what} is not a table")


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table in which the values of ``over`` replace those of ``under``, table by table."""
    both = {
        key: _merged(under[key], value) if isinstance(value, dict) and isinstance(under.get(key), dict) else value
        for key, value in over.items()
    }
    return {**under, **both}
