"""The command by which a person, or the client of a beamline, becomes known to Globus."""

from pathlib import Path
from typing import Annotated

import typer


def login(
    globus: Annotated[Path, typer.Argument(metavar="GLOBUS.yaml", help="Who, and which collections want a consent.")],
) -> None:
    """Log in to Globus, with the consents that mapped collections want, and see that the service takes it.

    A person is shown an address to open, once in six months; a client with a secret needs nobody, and is only tried.
    Who is told of a consent that is wanted adds that collection to `mapped_collections`, and comes here again.

    hpc-bridge login globus.yaml
    """
    from globus_sdk import GlobusError

    from hpc_bridge.config import read
    from hpc_bridge.transfer_config import Globus
    from hpc_bridge.transfer_globus_errors import judge
    from hpc_bridge.transfer_login import Login

    known = Login(read(globus, Globus))
    try:
        known.app.login(force=True)
        known.client.task_list(limit=1)
    except GlobusError as error:
        raise judge(error) from None
    finally:
        known.close()
    typer.echo("Globus knows us", err=True)
