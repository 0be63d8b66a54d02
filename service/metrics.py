"""What is counted, for Prometheus."""

from prometheus_client import Counter, Gauge, Histogram

REQUESTS = Counter("plait_requests_total", "HTTP requests", ("route", "method", "status"))
SECONDS = Histogram("plait_request_seconds", "Seconds of HTTP requests", ("route",))
OPERATIONS = Counter("plait_operations_total", "Operations that are done", ("kind", "state"))
WAITING = Gauge("plait_operations_waiting", "Operations that are promised and not done")
OLDEST = Gauge("plait_oldest_operation_seconds", "Since the oldest of them was promised")
RUNS = Gauge("plait_runs_resident", "Runs in the engine's memory")
ENGINE_UP = Gauge("plait_engine_up", "Whether the engine answers")
ENGINE_RESTARTS = Gauge("plait_engine_restarts", "How often the engine was started again")
