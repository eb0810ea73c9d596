"""One sample of every message, used both ways by the tests of the wire.

`PYTHONPATH=. python tests/protocol/wire_samples.py` adds to golden_frames.json the frames of messages that are new or
have gained a field; it never changes one that stands there: an old peer still sends it.
"""

from __future__ import annotations

import json
from pathlib import Path

from protocol import messages as m
from protocol.batches import Sampling, SessionRows
from protocol.frames import encode
from protocol.ids import RequestId, SessionId, WorkerId
from protocol.plans import Plan, Share, Stage
from protocol.specs import ActivationFormat, ModelSpec, RopeKind, RopeSpec, Span, WeightFormat

GOLDEN_FILE = Path(__file__).with_name("golden_frames.json")
KEY = b"rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"
DIGEST = bytes(range(32))
ALPHA, BETA, GAMMA = WorkerId("alpha"), WorkerId("beta"), WorkerId("gamma-3.local")
REQUEST, SESSION = RequestId("r-1"), SessionId(7)

MODEL = ModelSpec(
    name="tiny",
    family="llama",
    hidden=64,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=16,
    intermediate=160,
    vocab=5000,
    max_positions=512,
    norm_eps=1e-6,
    rope=RopeSpec(
        theta=500000.0,
        kind=RopeKind.LLAMA3,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_positions=128,
    ),
    ffn_tiles=4,
    weights=WeightFormat.INT8,
    activations=ActivationFormat.BFLOAT16,
    qk_norm=True,
    sliding_windows=(0, 16, 0),
)
PLAN = Plan(
    epoch=3,
    model=MODEL,
    head=ALPHA,
    stages=(
        Stage(
            layers=Span(0, 2),
            members=(
                Share(worker=ALPHA, groups=Span(0, 1), ffn=Span(0, 3)),
                Share(worker=BETA, groups=Span(1, 2), ffn=Span(3, 4)),
            ),
            hub=1,
        ),
        Stage(layers=Span(2, 3), members=(Share(worker=GAMMA, groups=Span(0, 2), ffn=Span(0, 4)),)),
    ),
    wire=ActivationFormat.BFLOAT16,
    words="1/2,1",
)
PROFILE = m.DeviceProfile(
    system="Linux 6.1",
    machine="aarch64",
    cores=4,
    memory_bytes=8 * 2**30,
    available_bytes=6 * 2**30,
    budget_bytes=2 * 2**30,
    device="cpu",
    torch="2.13.0",
)
PEER = m.Peer(worker=BETA, public_key=KEY, addresses=("tcp://10.0.0.2:4000", "tcp://[::1]:4000"))
ROWS = (
    SessionRows(session=SESSION, start=0, count=5, capacity=64),
    SessionRows(session=SessionId(8), start=31, count=1, capacity=32, sample=True),
)
SAMPLING = Sampling(temperature=0.7, top_k=40, top_p=0.9, min_p=0.05, repetition_penalty=1.1, seed=2**63 - 1)
REPORT = m.ErrorReport(code="peer-lost", text="beta left", remedy="ask again", node="beta", phase="step", request="r-1")

SAMPLES: tuple[object, ...] = (
    REPORT,
    m.Enroll(oldest_version=1, version=1, software="manyhands 0.1.0", name="pi", public_key=KEY),
    m.Enrolled(worker=ALPHA, cluster="home"),
    m.Hello(
        oldest_version=1,
        version=1,
        software="manyhands 0.1.0",
        worker=ALPHA,
        profile=PROFILE,
        data_addresses=("tcp://10.0.0.1:4000",),
        epoch=2,
        phase=m.WorkerPhase.IDLE,
    ),
    m.ClientHello(oldest_version=1, version=1, software="manyhands 0.1.0"),
    m.Welcome(version=1, software="manyhands 0.1.0", cluster="home", term=4, heartbeat_s=0.5, lease_s=3.0),
    m.Heartbeat(
        sequence=9,
        epoch=3,
        phase=m.WorkerPhase.READY,
        progress=2**40,
        resident_bytes=2**30,
        weight_bytes=2**29,
        kv_bytes=2**20,
    ),
    m.HeartbeatReply(sequence=9),
    m.Leave(reason="going home"),
    m.Probe(probe=1, peers=(PEER,)),
    m.Reached(probe=1, workers=(BETA, GAMMA)),
    m.Load(plan=PLAN, links=(m.LinkOrder(peer=PEER, mode=m.LinkMode.DIAL),)),
    m.LoadProgress(epoch=3, phase="fetch", done_bytes=5, total_bytes=10),
    m.Loaded(epoch=3, weight_bytes=10, fetched_bytes=5, resident_bytes=2**27, load_s=1.25),
    m.Unload(epoch=3, reason="beta left"),
    m.Release(sessions=(SESSION, SessionId(8))),
    m.Fault(epoch=3, error=REPORT, lost="beta"),
    m.Stock(order=4, holders=(m.Holder(peer=PEER, layers=Span(0, 2), groups=Span(0, 1), ffn=Span(0, 3)),)),
    m.Stocked(order=4, done_bytes=10, total_bytes=20, is_over=True, error="the disk is full"),
    m.LeaveAsk(reason="SIGTERM"),
    m.Goodbye(reason="handed over"),
    m.KvRows(epoch=3, session=SESSION, cells=m.Cells(layers=Span(1, 2), groups=Span(0, 2)), start=5, count=3),
    m.TileRequest(digest=DIGEST, offset=1024, length=2**20),
    m.TileChunk(digest=DIGEST, offset=1024),
    m.Step(epoch=3, step=2**53, rows=ROWS, opens=(m.SessionSampling(session=SESSION, sampling=SAMPLING),)),
    m.StepDone(epoch=3, step=12, tokens=(m.SampledToken(session=SESSION, token=2**31 - 1, logprob=-0.5),), step_s=0.02),
    m.Activation(epoch=3, step=12, stage=1, format=ActivationFormat.BFLOAT16, rows=ROWS),
    m.Partial(epoch=3, step=12, op=5, rank=1, format=ActivationFormat.FLOAT32),
    m.Sum(epoch=3, step=12, op=5, format=ActivationFormat.FLOAT32),
    m.LinkHello(worker=ALPHA, epoch=3),
    m.LinkWelcome(worker=BETA, epoch=3),
    m.Relay(source=ALPHA, target=GAMMA),
    m.Generate(
        request=REQUEST,
        prompt_kind=m.PromptKind.CHAT,
        max_tokens=64,
        sampling=SAMPLING,
        stop=("\n\n", "Ende."),
        ignore_eos=True,
    ),
    m.Accepted(request=REQUEST, session=SESSION, prompt_tokens=11),
    m.Piece(request=REQUEST, index=3, text="grüße", tokens=(1, 2, 70000)),
    m.Waiting(request=REQUEST, phase="loading"),
    m.Finished(
        request=REQUEST,
        reason=m.FinishReason.STOP,
        usage=m.Usage(prompt_tokens=11, completion_tokens=20),
        timings=m.Timings(queued_s=0.1, first_token_s=0.4, total_s=2.5),
    ),
    m.Resume(request=REQUEST, tokens=12, chars=40),
    m.Drain(worker=BETA),
    m.Draining(worker=BETA),
    m.Cancel(request=REQUEST),
    m.StatusRequest(),
    m.StatusReport(),
    m.InviteRequest(trusted=True),
    m.Invitation(link="manyhands://10.0.0.1:4000/join/a.b"),
)


def name_of(message: object) -> str:
    """Return the name that a message has in the golden file and in test ids."""
    return type(message).__name__


def add_missing() -> list[str]:
    """Add frames of messages that have none yet or have gained a field; return the names they stand under."""
    golden = json.loads(GOLDEN_FILE.read_text(encoding="utf-8")) if GOLDEN_FILE.exists() else {}
    added = []
    for message in SAMPLES:
        versions = [name for name in golden if name.split("@")[0] == name_of(message)]
        frame = bytes(encode(message)[0]).hex()
        if not versions or golden[versions[-1]] != frame:
            name = f"{name_of(message)}@{len(versions) + 1}" if versions else name_of(message)
            golden[name] = frame
            added.append(name)
    GOLDEN_FILE.write_text(json.dumps(golden, indent=2) + "\n", encoding="utf-8")
    return added


if __name__ == "__main__":
    print("added:", ", ".join(add_missing()) or "nothing")
