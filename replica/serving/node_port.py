"""Keeps Serve's port for calls between deployments off other interfaces than the node's."""

import ray
from ray._common.tls_utils import add_port_to_grpc_server
from ray.serve._private import replica


def bind_to_node() -> None:
    """For the process of a deployment's replica, before Serve opens that port, on any interface."""
    host = ray.util.get_node_ip_address()
    own = f"[{host}]:0" if ":" in host else f"{host}:0"
    replica.add_port_to_grpc_server = lambda server, _: add_port_to_grpc_server(server, own)
