"""Traced application: makes a one-span segment every 100 ms, named SERVICE-N, each an endpoint of its own.

Usage: python_agent.py SERVICE OAP_ADDRESS
"""
import itertools
import sys
import time

from skywalking import agent, config
from skywalking.trace.context import get_context

SERVICE, OAP = sys.argv[1:]

config.init(
    agent_name=SERVICE,
    agent_instance_name=SERVICE,
    agent_collector_backend_services=OAP,
    agent_protocol="grpc",
    agent_logging_level="INFO",
)
agent.start()
for number in itertools.count():
    time.sleep(0.1)
    with get_context().new_entry_span(op=f"{SERVICE}-{number}"):
        pass
    print("made", number, flush=True)
