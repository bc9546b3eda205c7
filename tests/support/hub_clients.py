"""Processes that know no other Hub than the one of the test, and start in a tenth of a second.

Where the Hub is, its clients read when they are imported. All hubs of a test module therefore
have one address, one after the other, and all of its processes are forks of one server.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fork_server import ForkServer
from hub import Hub

TOKEN = "hf_owner_token"
SECONDS = 120


class HubWithClients(Hub):
    clients: "HubClients"


class HubClients:
    """Use as a context manager. home: of the clients' caches, emptied for each hub; sleeps_at_most:
    what a back-off takes, in seconds."""

    def __init__(self, home: Path, *, sleeps_at_most: float = 0.05, **environment: str) -> None:
        self.home = home
        with Hub() as hub:
            self.port = hub.servers[0].server_port
            settings = hub.environment(home, **environment)
        self.forks = ForkServer(settings, sleeps_at_most=sleeps_at_most)

    def __enter__(self) -> "HubClients":
        self.forks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.forks.__exit__(*error)

    def new_hub(self, **settings: Any) -> HubWithClients:
        shutil.rmtree(self.home, ignore_errors=True)
        hub = HubWithClients(port=self.port, **settings)
        hub.clients = self
        return hub

    def run(
        self,
        folder: Path,
        words: Sequence[str | Path],
        *,
        token: str | None = TOKEN,
        variables: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> tuple[int, str, str]:
        """Exit code, standard output and standard error of a program that works in `folder`.

        variables: of its environment; settings: as ForkServer.start takes them.
        """
        number = len(self.forks.processes)
        output = folder / f"process-{number}.out"
        log = folder / f"process-{number}.log"
        environment = dict(variables or {})
        if token is not None:
            environment["HF_TOKEN"] = token
        process = self.forks.start(
            words, log=log, output=output, cwd=folder, environment=environment, **settings
        )
        code = process.wait(SECONDS)
        return code, output.read_text(), log.read_text(errors="replace")
