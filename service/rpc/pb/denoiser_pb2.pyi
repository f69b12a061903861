from google.protobuf import struct_pb2 as _struct_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DenoiseRequest(_message.Message):
    __slots__ = ("text", "max_steps", "threshold", "halting", "restore", "top_k", "trace", "timeout_ms", "mask_ratio", "seed")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    MAX_STEPS_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    HALTING_FIELD_NUMBER: _ClassVar[int]
    RESTORE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    MASK_RATIO_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    text: str
    max_steps: int
    threshold: float
    halting: str
    restore: str
    top_k: int
    trace: bool
    timeout_ms: int
    mask_ratio: float
    seed: int
    def __init__(self, text: _Optional[str] = ..., max_steps: _Optional[int] = ..., threshold: _Optional[float] = ..., halting: _Optional[str] = ..., restore: _Optional[str] = ..., top_k: _Optional[int] = ..., trace: _Optional[bool] = ..., timeout_ms: _Optional[int] = ..., mask_ratio: _Optional[float] = ..., seed: _Optional[int] = ...) -> None: ...

class DenoiseResponse(_message.Message):
    __slots__ = ("text", "steps", "max_steps", "halt_reason", "level", "restored", "trace", "timing_ms", "model", "corrupted_text")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    MAX_STEPS_FIELD_NUMBER: _ClassVar[int]
    HALT_REASON_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    RESTORED_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    TIMING_MS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CORRUPTED_TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    steps: int
    max_steps: int
    halt_reason: str
    level: float
    restored: _containers.RepeatedCompositeFieldContainer[Restored]
    trace: _containers.RepeatedCompositeFieldContainer[TracePoint]
    timing_ms: Timing
    model: str
    corrupted_text: str
    def __init__(self, text: _Optional[str] = ..., steps: _Optional[int] = ..., max_steps: _Optional[int] = ..., halt_reason: _Optional[str] = ..., level: _Optional[float] = ..., restored: _Optional[_Iterable[_Union[Restored, _Mapping]]] = ..., trace: _Optional[_Iterable[_Union[TracePoint, _Mapping]]] = ..., timing_ms: _Optional[_Union[Timing, _Mapping]] = ..., model: _Optional[str] = ..., corrupted_text: _Optional[str] = ...) -> None: ...

class Restored(_message.Message):
    __slots__ = ("start", "end", "text", "probability", "step", "candidates")
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    start: int
    end: int
    text: str
    probability: float
    step: int
    candidates: _containers.RepeatedCompositeFieldContainer[Candidate]
    def __init__(self, start: _Optional[int] = ..., end: _Optional[int] = ..., text: _Optional[str] = ..., probability: _Optional[float] = ..., step: _Optional[int] = ..., candidates: _Optional[_Iterable[_Union[Candidate, _Mapping]]] = ...) -> None: ...

class Candidate(_message.Message):
    __slots__ = ("text", "probability")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    text: str
    probability: float
    def __init__(self, text: _Optional[str] = ..., probability: _Optional[float] = ...) -> None: ...

class TracePoint(_message.Message):
    __slots__ = ("step", "level")
    STEP_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    step: int
    level: float
    def __init__(self, step: _Optional[int] = ..., level: _Optional[float] = ...) -> None: ...

class Timing(_message.Message):
    __slots__ = ("queue", "compute", "total")
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    queue: float
    compute: float
    total: float
    def __init__(self, queue: _Optional[float] = ..., compute: _Optional[float] = ..., total: _Optional[float] = ...) -> None: ...

class DenoiseBatchRequest(_message.Message):
    __slots__ = ("items", "options")
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[DenoiseRequest]
    options: Options
    def __init__(self, items: _Optional[_Iterable[_Union[DenoiseRequest, _Mapping]]] = ..., options: _Optional[_Union[Options, _Mapping]] = ...) -> None: ...

class Options(_message.Message):
    __slots__ = ("max_steps", "threshold", "halting", "restore", "top_k", "trace", "timeout_ms", "mask_ratio", "seed")
    MAX_STEPS_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    HALTING_FIELD_NUMBER: _ClassVar[int]
    RESTORE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    MASK_RATIO_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    max_steps: int
    threshold: float
    halting: str
    restore: str
    top_k: int
    trace: bool
    timeout_ms: int
    mask_ratio: float
    seed: int
    def __init__(self, max_steps: _Optional[int] = ..., threshold: _Optional[float] = ..., halting: _Optional[str] = ..., restore: _Optional[str] = ..., top_k: _Optional[int] = ..., trace: _Optional[bool] = ..., timeout_ms: _Optional[int] = ..., mask_ratio: _Optional[float] = ..., seed: _Optional[int] = ...) -> None: ...

class DenoiseBatchResponse(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[BatchResult]
    def __init__(self, results: _Optional[_Iterable[_Union[BatchResult, _Mapping]]] = ...) -> None: ...

class BatchResult(_message.Message):
    __slots__ = ("answer", "problem")
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    answer: DenoiseResponse
    problem: Problem
    def __init__(self, answer: _Optional[_Union[DenoiseResponse, _Mapping]] = ..., problem: _Optional[_Union[Problem, _Mapping]] = ...) -> None: ...

class Problem(_message.Message):
    __slots__ = ("code", "message", "errors")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    errors: _containers.RepeatedCompositeFieldContainer[FieldProblem]
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., errors: _Optional[_Iterable[_Union[FieldProblem, _Mapping]]] = ...) -> None: ...

class FieldProblem(_message.Message):
    __slots__ = ("field", "message")
    FIELD_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    field: str
    message: str
    def __init__(self, field: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class DenoiseEvent(_message.Message):
    __slots__ = ("answer",)
    PASS_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    answer: DenoiseResponse
    def __init__(self, answer: _Optional[_Union[DenoiseResponse, _Mapping]] = ..., **kwargs) -> None: ...

class Pass(_message.Message):
    __slots__ = ("step", "level", "text")
    STEP_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    step: int
    level: float
    text: str
    def __init__(self, step: _Optional[int] = ..., level: _Optional[float] = ..., text: _Optional[str] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("name", "digest", "device", "precision", "n_parameters", "configuration", "limits")
    class LimitsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    N_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    CONFIGURATION_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: str
    device: str
    precision: str
    n_parameters: int
    configuration: _struct_pb2.Struct
    limits: _containers.ScalarMap[str, int]
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[str] = ..., device: _Optional[str] = ..., precision: _Optional[str] = ..., n_parameters: _Optional[int] = ..., configuration: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., limits: _Optional[_Mapping[str, int]] = ...) -> None: ...
