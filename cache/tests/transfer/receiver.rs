//! The receiver's transcripts.

use cache::transfer::{
    AttemptError, AttemptId, HandOffOutcome, Receiver, ReceiverInput, ReceiverOutput, Rejection,
    Source, StreamId, Violation,
};
use protocol::frame::{Frame, Kind};
use protocol::transfer::{KV_TOKENS_MAX, KvAsk, KvFrameError, KvProgress, KvRefusal};
use protocol::{Instant, Machine, RequestId};

use super::*;

struct Bench {
    receiver: Receiver,
    now: Instant,
}

impl Bench {
    fn new() -> Self {
        Bench { receiver: Receiver::new(config()), now: at(0) }
    }

    fn give(&mut self, input: ReceiverInput) -> Vec<ReceiverOutput> {
        let mut out = Vec::new();
        self.receiver.handle(self.now, input, &mut out);
        out
    }

    fn control<T: bincode::Encode>(&mut self, kind: Kind, value: &T) -> Vec<ReceiverOutput> {
        self.give(ReceiverInput::Control { attempt: FIRST, frame: Frame::new(kind, value) })
    }

    fn data(&mut self, frame: Frame) -> Vec<ReceiverOutput> {
        self.give(ReceiverInput::Data { stream: STREAM, peer: node(1), frame })
    }

    fn written(&mut self, digests: std::ops::Range<u8>) -> Vec<ReceiverOutput> {
        let digests = digests.map(digest).collect();
        self.give(ReceiverInput::Written { stream: STREAM, digests })
    }

    /// Asks node 1 for five blocks, which has accepted and opened its data stream.
    fn live() -> Self {
        let mut bench = Bench::new();
        bench.give(ReceiverInput::Start(handoff(5)));
        bench.give(ReceiverInput::Reserved { request: REQUEST, blocks: blocks(10..15) });
        assert_eq!(bench.control(Kind::KV_ACCEPT, &()), []);
        assert_eq!(bench.data(header(REQUEST, 0)), []);
        bench
    }

    /// The ask that goes out, and for which attempt.
    fn asked(out: &[ReceiverOutput]) -> (AttemptId, NodeId, KvAsk) {
        let ask = out.iter().find_map(|output| match output {
            ReceiverOutput::Ask { attempt, peer, frame } => {
                Some((*attempt, *peer, KvAsk::from_frame(frame).expect("sound")))
            }
            _ => None,
        });
        ask.unwrap_or_else(|| panic!("no ask in {out:?}"))
    }
}

fn close(attempt: AttemptId, done: bool) -> ReceiverOutput {
    ReceiverOutput::Close { attempt, done }
}

fn attempted(error: AttemptError) -> ReceiverOutput {
    ReceiverOutput::Attempted { request: REQUEST, attempt: FIRST, peer: node(1), error }
}

fn ended(verified: usize, outcome: HandOffOutcome) -> ReceiverOutput {
    ReceiverOutput::Ended { request: REQUEST, verified, outcome }
}

fn free(range: std::ops::Range<u32>) -> ReceiverOutput {
    ReceiverOutput::Free { blocks: blocks(range) }
}

fn attach(range: std::ops::Range<u8>) -> ReceiverOutput {
    let pages = range.map(|n| (BlockId(10 + u32::from(n)), name(n))).collect();
    ReceiverOutput::Attach { request: REQUEST, blocks: pages }
}

/// Asks node 1 alone for two blocks, and has them, but not the end.
fn whole_but_for_the_end(prefill: bool, first_token: KvFirstToken) -> Vec<ReceiverOutput> {
    let mut bench = Bench::new();
    let mut handoff = handoff(2);
    handoff.sources = vec![Source { peer: node(1), prefill, streams: 1 }];
    handoff.prompt.first_token = first_token;
    bench.give(ReceiverInput::Start(handoff));
    bench.give(ReceiverInput::Reserved { request: REQUEST, blocks: blocks(10..12) });
    bench.data(header(REQUEST, 0));
    bench.data(chunk(0, 2));
    bench.written(0..2);
    bench.data(commit(0, 0..2, None))
}

#[test]
fn only_who_wants_a_token_waits_for_it() {
    let done = [
        attach(0..2),
        close(FIRST, true),
        ended(2, HandOffOutcome::Complete { first_token: None, cached: 0 }),
    ];
    assert_eq!(whole_but_for_the_end(false, KvFirstToken::Greedy), done);
    assert_eq!(whole_but_for_the_end(true, KvFirstToken::Receiver), done);
    assert_eq!(whole_but_for_the_end(true, KvFirstToken::Greedy), [attach(0..2)]);
}

#[test]
fn a_whole_hand_off() {
    let mut bench = Bench::new();
    let out = bench.give(ReceiverInput::Start(HandOff {
        sources: vec![Source { peer: node(1), prefill: true, streams: 200 }],
        ..handoff(3)
    }));
    assert_eq!(out, [ReceiverOutput::Reserve { request: REQUEST, blocks: 3 }]);
    let out = bench.give(ReceiverInput::Reserved { request: REQUEST, blocks: blocks(10..13) });
    let (attempt, peer, ask) = Bench::asked(&out);
    assert_eq!((attempt, peer, out.len()), (FIRST, node(1), 1));
    assert_eq!((ask.request, ask.attempt, ask.first, ask.deadline_ms), (7, 0, 3, 1000));
    assert_eq!((ask.wanted, ask.work), (vec![[0; 32], [1; 32], [2; 32]], prefill()));
    assert_eq!(ask.format, format());
    assert_eq!(ask.streams, 8, "no more than the protocol has");

    assert_eq!(bench.control(Kind::KV_ACCEPT, &()), []);
    assert_eq!(bench.control(Kind::KV_PROGRESS, &KvProgress { ready: 1 }), []);
    assert_eq!(bench.data(header(REQUEST, 0)), []);
    let names = vec![name(0), name(1)];
    let write = ReceiverOutput::Write { stream: STREAM, blocks: blocks(10..12), names };
    assert_eq!(bench.data(chunk(0, 2)), [write]);
    assert_eq!(bench.written(0..2), []);
    assert_eq!(bench.data(commit(0, 0..2, None)), [attach(0..2)]);
    let write =
        ReceiverOutput::Write { stream: STREAM, blocks: blocks(12..13), names: vec![name(2)] };
    assert_eq!(bench.data(chunk(2, 1)), [write]);
    bench.written(2..3);
    let outcome = HandOffOutcome::Complete { first_token: Some(9), cached: 0 };
    let expected = [attach(2..3), close(FIRST, true), ended(3, outcome)];
    assert_eq!(bench.data(commit(2, 2..3, Some(Some(9)))), expected);

    assert_eq!((bench.receiver.in_flight(), bench.receiver.next_deadline()), (0, None));
    assert_eq!(bench.give(ReceiverInput::DataClosed { stream: STREAM }), []);
    assert_eq!(bench.give(ReceiverInput::ControlClosed { attempt: FIRST }), []);
}

#[test]
fn the_next_source_is_asked_for_what_is_missing() {
    // Node 1 had no more; node 2 is asked for the rest, as another attempt.
    let mut bench = Bench::live();
    bench.data(chunk(0, 2));
    bench.written(0..2);
    bench.now = at(400);
    let out = bench.data(commit(0, 0..2, Some(None)));
    let (attempt, peer, ask) = Bench::asked(&out);
    assert_eq!(out[..2], [attach(0..2), close(FIRST, true)]);
    assert!(out.contains(&attempted(AttemptError::Exhausted)), "{out:?}");
    assert_eq!((attempt, peer, ask.attempt, ask.first), (AttemptId(1), node(2), 1, 5));
    assert_eq!((ask.wanted.len(), ask.work, ask.deadline_ms), (3, prefill(), 600));
    // Whatever the first stream still brings is stopped; so is a stream that claims another attempt,
    // comes from somebody else, or is for another request.
    for (stream, peer, frame) in [
        (STREAM, 1, chunk(2, 2)),
        (StreamId(5), 1, header(REQUEST, 0)),
        (StreamId(6), 1, header(REQUEST, 1)),
        (StreamId(7), 2, header(RequestId(8), 1)),
        (StreamId(8), 2, header(REQUEST, 2)),
        (StreamId(9), 2, chunk(0, 1)),
    ] {
        let out = bench.give(ReceiverInput::Data { stream, peer: node(peer), frame });
        assert_eq!(out, [ReceiverOutput::Stop { stream }], "{stream:?}");
    }
    // The right one is taken, once; its numbers begin anew.
    let stream = StreamId(2);
    let data = |frame| ReceiverInput::Data { stream, peer: node(2), frame };
    assert_eq!(bench.give(data(header(REQUEST, 1))), []);
    let second = StreamId(3);
    let frame = header(REQUEST, 1);
    let out = bench.give(ReceiverInput::Data { stream: second, peer: node(2), frame });
    assert_eq!(out, [ReceiverOutput::Stop { stream: second }]);
    let names = vec![name(2), name(3)];
    let write = ReceiverOutput::Write { stream, blocks: blocks(12..14), names };
    assert_eq!(bench.give(data(chunk(0, 2))), [write]);
    // The last source fails: what is verified stays, and the rest is freed when its writer has stopped.
    let out = bench.give(ReceiverInput::ControlClosed { attempt: AttemptId(1) });
    let error = AttemptError::Lost;
    let attempted = ReceiverOutput::Attempted {
        request: REQUEST,
        attempt: AttemptId(1),
        peer: node(2),
        error: error.clone(),
    };
    let expected = [
        close(AttemptId(1), false),
        ReceiverOutput::Stop { stream },
        attempted,
        free(14..15),
        ended(2, HandOffOutcome::Incomplete(error)),
    ];
    assert_eq!(out, expected);
    assert_eq!((bench.receiver.in_flight(), bench.receiver.next_deadline()), (1, None));
    assert_eq!(bench.give(ReceiverInput::WriteStopped { stream }), [free(12..14)]);
    assert_eq!(bench.receiver.in_flight(), 0);
}

#[test]
fn pages_are_the_writers_until_it_has_stopped() {
    // The next attempt waits for the writer of the one before.
    let mut bench = Bench::live();
    bench.data(chunk(0, 2));
    let refused = AttemptError::Refused(KvRefusal::Aborted);
    assert!(!refused.is_misbehaviour());
    let out = bench.control(Kind::KV_REFUSAL, &KvRefusal::Aborted);
    let stop = ReceiverOutput::Stop { stream: STREAM };
    assert_eq!(out, [close(FIRST, false), stop.clone(), attempted(refused)]);
    assert_eq!(bench.receiver.next_deadline(), Some(at(1000)));
    let out = bench.written(0..2);
    let (attempt, peer, ask) = Bench::asked(&out);
    assert_eq!((attempt, peer, ask.wanted.len(), out.len()), (AttemptId(1), node(2), 5, 1));

    // Cancelled in the middle of a write, or while waiting for the writer: freed but for its pages.
    for waits in [false, true] {
        let mut bench = Bench::live();
        bench.data(chunk(0, 2));
        if waits {
            bench.control(Kind::KV_REFUSAL, &KvRefusal::Aborted);
        }
        let out = bench.give(ReceiverInput::Cancel { request: REQUEST });
        let mut expected = vec![free(12..15), ended(0, HandOffOutcome::Cancelled)];
        if !waits {
            expected.splice(..0, [close(FIRST, false), stop.clone()]);
        }
        assert_eq!(out, expected);
        assert_eq!(bench.written(0..2), [free(10..12)]);
        assert_eq!(bench.receiver.in_flight(), 0);
        assert_eq!(bench.give(ReceiverInput::Cancel { request: REQUEST }), []);
    }
}

#[test]
fn what_no_honest_peer_sends_ends_the_attempt() {
    let unexpected = |kind: Kind| AttemptError::Violation(Violation::Unexpected { kind: kind.0 });
    let range = |first, end| AttemptError::Violation(Violation::OutOfRange { first, end });
    let count = |n| {
        let (what, min, max) = ("blocks", 1, 1024);
        AttemptError::Violation(Violation::Frame(KvFrameError::Count { what, n, min, max }))
    };
    type Step = fn(&mut Bench) -> Vec<ReceiverOutput>;
    let table: [(Step, AttemptError); 16] = [
        (|b| b.control(Kind::KV_ACCEPT, &()), unexpected(Kind::KV_ACCEPT)),
        (|b| b.control(Kind::KV_ASK, &()), unexpected(Kind::KV_ASK)),
        (|b| b.data(header(REQUEST, 0)), unexpected(Kind::KV_STREAM)),
        (|b| b.data(chunk(1, 1)), range(1, 2)),
        (|b| b.data(chunk(0, 6)), range(0, 6)),
        (|b| b.data(chunk(u32::MAX, 1)), range(u32::MAX, 1 << 32)),
        (|b| b.data(chunk(0, 0)), count(0)),
        (|b| b.data(chunk(0, 2000)), count(2000)),
        (|b| b.data(commit(0, 0..1, None)), unexpected(Kind::KV_COMMIT)),
        (|b| b.data(commit(1, 0..0, Some(None))), unexpected(Kind::KV_COMMIT)),
        (|b| after_chunk(b, chunk(2, 1)), unexpected(Kind::KV_CHUNK)),
        (|b| after_chunk(b, commit(0, 0..1, None)), unexpected(Kind::KV_COMMIT)),
        (|b| after_chunk(b, commit(0, 0..3, None)), unexpected(Kind::KV_COMMIT)),
        (|b| after_chunk(b, commit(1, 0..2, None)), unexpected(Kind::KV_COMMIT)),
        (|b| after_chunk(b, commit(0, 1..3, None)), AttemptError::Corrupt { block: 0 }),
        (|b| after_chunk(b, commit(0, 0..0, Some(None))), unexpected(Kind::KV_COMMIT)),
    ];
    for (number, (step, error)) in table.into_iter().enumerate() {
        let mut bench = Bench::live();
        let out = step(&mut bench);
        assert!(error.is_misbehaviour());
        assert!(out.contains(&attempted(error)), "{number}: {out:?}");
        assert!(!out.iter().any(|o| matches!(o, ReceiverOutput::Attach { .. })), "{number}");
        // It goes on with the other source, from the beginning.
        assert_eq!(Bench::asked(&out).2.wanted.len(), 5, "{number}");
    }
    // Optional kinds that are not known are skipped.
    let mut bench = Bench::live();
    let unknown = Frame { kind: Kind(Kind::OPTIONAL | 77), body: vec![1, 2, 3] };
    assert_eq!(bench.data(unknown.clone()), []);
    assert_eq!(bench.give(ReceiverInput::Control { attempt: FIRST, frame: unknown }), []);
}

fn after_chunk(bench: &mut Bench, frame: Frame) -> Vec<ReceiverOutput> {
    bench.data(chunk(0, 2));
    bench.written(0..2);
    bench.data(frame)
}

#[test]
fn every_wait_ends() {
    let waits = |bench: &mut Bench, until: u64, error: AttemptError| {
        assert_eq!(bench.receiver.next_deadline(), Some(at(until)));
        bench.now = at(until - 1);
        assert_eq!(bench.give(ReceiverInput::Timer), []);
        bench.now = at(until);
        let out = bench.give(ReceiverInput::Timer);
        assert!(out.contains(&attempted(error)), "{out:?}");
        assert_eq!(Bench::asked(&out).1, node(2));
    };
    // For an answer.
    let mut bench = Bench::new();
    bench.give(ReceiverInput::Start(handoff(5)));
    assert_eq!(bench.receiver.next_deadline(), Some(at(1000)));
    bench.now = at(20);
    bench.give(ReceiverInput::Reserved { request: REQUEST, blocks: blocks(10..15) });
    waits(&mut bench, 120, AttemptError::Unanswered);
    // For a sign of life; every frame is one.
    let mut bench = Bench::live();
    bench.now = at(90);
    bench.control(Kind::KV_PROGRESS, &KvProgress { ready: 0 });
    bench.now = at(150);
    bench.data(chunk(0, 1));
    waits_while_written(&mut bench);
    bench.written(0..1);
    waits(&mut bench, 360, AttemptError::Silent);
    // If this node itself was late, the peer gets its time again.
    let mut bench = Bench::live();
    assert_eq!(bench.receiver.next_deadline(), Some(at(200)));
    bench.now = at(420);
    assert_eq!(bench.give(ReceiverInput::Timer), []);
    waits(&mut bench, 620, AttemptError::Silent);
    // For everything together: signs of life do not help.
    let mut bench = Bench::live();
    for now in (0..1000).step_by(100) {
        bench.now = at(now);
        assert_eq!(bench.control(Kind::KV_PROGRESS, &KvProgress { ready: 0 }), []);
    }
    assert_eq!(bench.receiver.next_deadline(), Some(at(1000)));
    bench.now = at(1000);
    let out = bench.give(ReceiverInput::Timer);
    assert!(out.contains(&ended(0, HandOffOutcome::Deadline)), "{out:?}");
    assert!(out.contains(&free(10..15)), "{out:?}");
}

fn waits_while_written(bench: &mut Bench) {
    assert_eq!(bench.receiver.next_deadline(), Some(at(350)));
    bench.now = at(160);
}

#[test]
fn nothing_is_begun_without_room() {
    let mut bench = Bench::new();
    bench.give(ReceiverInput::Start(handoff(5)));
    let out = bench.give(ReceiverInput::Reserved { request: REQUEST, blocks: Vec::new() });
    assert_eq!(out, [ended(0, HandOffOutcome::NoRoom)]);
    // Cancelled before the answer: what is reserved then is freed.
    bench.give(ReceiverInput::Start(handoff(5)));
    let out = bench.give(ReceiverInput::Cancel { request: REQUEST });
    assert_eq!(out, [ended(0, HandOffOutcome::Cancelled)]);
    let out = bench.give(ReceiverInput::Reserved { request: REQUEST, blocks: blocks(0..5) });
    assert_eq!(out, [free(0..5)]);

    let rejected = |bench: &mut Bench, handoff, rejection| {
        let out = bench.give(ReceiverInput::Start(handoff));
        let [ReceiverOutput::Ended { verified: 0, outcome, .. }] = &out[..] else {
            panic!("{out:?}");
        };
        assert_eq!(*outcome, HandOffOutcome::Rejected(rejection));
    };
    rejected(&mut bench, handoff(0), Rejection::Blocks { blocks: 0, max: 8 });
    rejected(&mut bench, handoff(9), Rejection::Blocks { blocks: 9, max: 8 });
    let none = HandOff { sources: Vec::new(), ..handoff(1) };
    rejected(&mut bench, none, Rejection::Sources { sources: 0 });
    let source = Source { peer: node(1), prefill: true, streams: 1 };
    let many = HandOff { sources: vec![source; 9], ..handoff(1) };
    rejected(&mut bench, many, Rejection::Sources { sources: 9 });
    let mut long = handoff(1);
    long.prompt.tokens = vec![0; KV_TOKENS_MAX + 1];
    rejected(&mut bench, long, Rejection::Tokens { tokens: KV_TOKENS_MAX + 1 });
    bench.give(ReceiverInput::Start(handoff(1)));
    rejected(&mut bench, handoff(1), Rejection::Twice);
    let another = |n| HandOff { request: RequestId(n), ..handoff(1) };
    bench.give(ReceiverInput::Start(another(8)));
    rejected(&mut bench, another(9), Rejection::Busy { max: 2 });
    let late = HandOff { request: REQUEST, deadline: at(0), ..handoff(1) };
    let out = Bench::new().give(ReceiverInput::Start(late));
    assert_eq!(out, [ended(0, HandOffOutcome::Deadline)]);
}
