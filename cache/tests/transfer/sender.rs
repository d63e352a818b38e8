//! The sender's transcripts.

use cache::transfer::{Sender, SenderInput, SenderOutcome, SenderOutput, Served, TransferId};
use protocol::frame::{Frame, Kind};
use protocol::transfer::{KvAsk, KvProgress, KvRefusal};
use protocol::{Instant, Machine};

use super::*;

const ONE: TransferId = TransferId(1);

struct Bench {
    sender: Sender,
    now: Instant,
}

impl Bench {
    fn new() -> Self {
        Bench { sender: Sender::new(config()), now: at(0) }
    }

    fn give(&mut self, input: SenderInput) -> Vec<SenderOutput> {
        let mut out = Vec::new();
        self.sender.handle(self.now, input, &mut out);
        out
    }

    fn ask(&mut self, transfer: u64, ask: &KvAsk) -> Vec<SenderOutput> {
        let (transfer, peer) = (TransferId(transfer), node(9));
        self.give(SenderInput::Asked { transfer, peer, frame: Frame::new(Kind::KV_ASK, ask) })
    }

    fn ready(&mut self, range: std::ops::Range<u32>) -> Vec<SenderOutput> {
        self.give(SenderInput::Ready { transfer: ONE, blocks: blocks(range) })
    }

    fn sent(&mut self, digests: std::ops::Range<u8>) -> Vec<SenderOutput> {
        let digests = digests.map(digest).collect();
        self.give(SenderInput::Sent { transfer: ONE, digests })
    }

    /// Asked for five blocks.
    fn asked() -> Self {
        let mut bench = Bench::new();
        bench.ask(1, &ask(5));
        bench
    }

    fn is_clean(&self) -> bool {
        (self.sender.in_flight(), self.sender.promised(), self.sender.next_deadline())
            == (0, 0, None)
    }
}

fn ask(n: u8) -> KvAsk {
    KvAsk {
        request: REQUEST.0,
        attempt: 4,
        format: format(),
        first: 3,
        wanted: (0..n).map(|n| name(n).0).collect(),
        deadline_ms: 1000,
        streams: 3,
        work: prefill(),
    }
}

fn control<T: bincode::Encode>(kind: Kind, value: &T) -> SenderOutput {
    SenderOutput::Control { transfer: ONE, frame: Frame::new(kind, value) }
}

fn send(first: u8, range: std::ops::Range<u32>) -> SenderOutput {
    let n = range.len() as u8;
    let names = (first..first + n).map(name).collect();
    let frame = chunk(first.into(), n.into());
    SenderOutput::SendChunk { transfer: ONE, frame, blocks: blocks(range), names }
}

fn send_commit(frame: Frame, last: bool) -> SenderOutput {
    SenderOutput::SendCommit { transfer: ONE, frame, last }
}

fn unpin(range: std::ops::Range<u32>) -> SenderOutput {
    SenderOutput::Unpin { blocks: blocks(range) }
}

fn ended(sent: usize, outcome: SenderOutcome) -> SenderOutput {
    SenderOutput::Ended { transfer: ONE, sent, outcome }
}

#[test]
fn blocks_leave_as_they_are_filled() {
    let mut bench = Bench::new();
    let work = prefill();
    let names = (0..5).map(name).collect();
    let served = Served { peer: node(9), request: REQUEST, first: 3, names, work };
    let serve = SenderOutput::Serve { transfer: ONE, served };
    assert_eq!(bench.ask(1, &ask(5)), [control(Kind::KV_ACCEPT, &()), serve]);
    assert_eq!(bench.ready(0..0), []);
    let header = KvStream { request: REQUEST.0, attempt: 4, parts: 1 };
    let open = SenderOutput::OpenData { transfer: ONE, peer: node(9), header, streams: 3 };
    assert_eq!(bench.ready(20..23), [open, send(0, 20..22)]);
    // One chunk at a time is with the shell.
    assert_eq!(bench.ready(23..24), []);
    let expected = [unpin(20..22), send_commit(commit(0, 0..2, None), false), send(2, 22..24)];
    assert_eq!(bench.sent(0..2), expected);
    assert_eq!(bench.sent(2..4), [unpin(22..24), send_commit(commit(2, 2..4, None), false)]);
    assert_eq!(bench.sender.promised(), 5);
    assert_eq!(bench.ready(24..25), [send(4, 24..25)]);
    assert_eq!(
        bench.give(SenderInput::Finished { transfer: ONE, first_token: Some(6), cached: 0 }),
        []
    );
    let last = send_commit(commit(4, 4..5, Some(Some(6))), true);
    assert_eq!(bench.sent(4..5), [unpin(24..25), last]);
    assert_eq!((bench.sender.promised(), bench.sender.in_flight()), (0, 1));
    let out = bench.give(SenderInput::ControlClosed { transfer: ONE, finished: true });
    let close = SenderOutput::Close { transfer: ONE };
    assert_eq!(out, [close, ended(5, SenderOutcome::Complete)]);
    assert!(bench.is_clean());
}

#[test]
fn the_end_is_said_behind_the_last_block() {
    let mut bench = Bench::asked();
    bench.ready(20..23);
    bench.give(SenderInput::Finished { transfer: ONE, first_token: Some(6), cached: 0 });
    let expected = [unpin(20..22), send_commit(commit(0, 0..2, None), false), send(2, 22..23)];
    assert_eq!(bench.sent(0..2), expected);
    let last = send_commit(commit(2, 2..3, Some(Some(6))), true);
    assert_eq!(bench.sent(2..3), [unpin(22..23), last]);
}

#[test]
fn the_last_commit_may_be_empty_and_nothing_is_a_refusal() {
    let mut bench = Bench::asked();
    bench.ready(20..22);
    bench.sent(0..2);
    let out = bench.give(SenderInput::Finished { transfer: ONE, first_token: None, cached: 0 });
    assert_eq!(out, [send_commit(commit(2, 0..0, Some(None)), true)]);

    let mut bench = Bench::new();
    bench.ask(1, &KvAsk { work: KvWork::Cached, ..ask(5) });
    let out = bench.give(SenderInput::Finished { transfer: ONE, first_token: None, cached: 0 });
    let refusal = KvRefusal::Absent;
    let close = SenderOutput::Close { transfer: ONE };
    let expected =
        [control(Kind::KV_REFUSAL, &refusal), close, ended(0, SenderOutcome::Refused(refusal))];
    assert_eq!(out, expected);
    assert!(bench.is_clean());
}

#[test]
fn refused_before_a_byte_flows() {
    let other = |change: fn(&mut KvFormat)| {
        let mut ask = ask(5);
        change(&mut ask.format);
        ask
    };
    let malformed = KvAsk { wanted: Vec::new(), ..ask(1) };
    for (ask, refusal) in [
        (other(|f| f.block_tokens = 8), KvRefusal::OtherBlockTokens { theirs: 4 }),
        (other(|f| f.dtype = KvDtype::Bf16), KvRefusal::OtherDtype { theirs: KvDtype::F16 }),
        (other(|f| f.identity = [6; 32]), KvRefusal::OtherModel),
        (other(|f| f.layers = 2), KvRefusal::OtherLayers { first: 0, layers: 1 }),
        (other(|f| f.block_bytes = 64), KvRefusal::OtherBlockBytes { theirs: 32 }),
        (ask(9), KvRefusal::TooMany { max: 8 }),
        (KvAsk { deadline_ms: 0, ..ask(5) }, KvRefusal::Late),
        (malformed, KvRefusal::Protocol),
    ] {
        let mut bench = Bench::new();
        let out = bench.ask(1, &ask);
        let close = SenderOutput::Close { transfer: ONE };
        let outcome = SenderOutcome::Refused(refusal);
        assert_eq!(out, [control(Kind::KV_REFUSAL, &refusal), close, ended(0, outcome)]);
        assert!(bench.is_clean());
    }
    let refusal = |out: Vec<SenderOutput>| match out.last() {
        Some(SenderOutput::Ended { outcome: SenderOutcome::Refused(refusal), .. }) => *refusal,
        _ => panic!("{out:?}"),
    };
    // Eight and five blocks are more than may be pinned; so are three transfers.
    let mut bench = Bench::new();
    bench.ask(1, &ask(8));
    assert_eq!(refusal(bench.ask(2, &ask(5))), KvRefusal::Busy);
    bench.ask(3, &ask(1));
    assert_eq!(refusal(bench.ask(4, &ask(1))), KvRefusal::Busy);
    bench.give(SenderInput::ControlClosed { transfer: ONE, finished: false });
    bench.give(SenderInput::Leave);
    assert_eq!(refusal(bench.ask(5, &ask(1))), KvRefusal::Leaving);
    let mut bench = Bench::new();
    bench.sender = Sender::new(TransferConfig { prefills: false, ..config() });
    assert_eq!(refusal(bench.ask(1, &ask(1))), KvRefusal::NoPrefill);
    let out = bench.ask(2, &KvAsk { work: KvWork::Cached, ..ask(1) });
    assert!(matches!(out[1], SenderOutput::Serve { .. }), "{out:?}");
}

/// One peer's asks leave room for others', and its own next one once one is over.
#[test]
fn one_peer_has_a_share() {
    let mut bench = Bench::new();
    let config = TransferConfig { transfers_max: 4, transfers_per_peer_max: 2, ..config() };
    bench.sender = Sender::new(config);
    let ask_of = |bench: &mut Bench, transfer, peer| {
        let frame = Frame::new(Kind::KV_ASK, &ask(1));
        let asked = SenderInput::Asked { transfer: TransferId(transfer), peer: node(peer), frame };
        bench.give(asked).iter().any(|out| matches!(out, SenderOutput::Serve { .. }))
    };
    let taken: Vec<bool> = (1..=3).map(|n| ask_of(&mut bench, n, 9)).collect();
    assert_eq!(taken, [true, true, false]);
    let taken: Vec<bool> = (4..=7).map(|n| ask_of(&mut bench, n, n as u8)).collect();
    assert_eq!(taken, [true, true, false, false], "four in all");
    bench.give(SenderInput::ControlClosed { transfer: ONE, finished: false });
    assert!(ask_of(&mut bench, 8, 9));
    assert!(!ask_of(&mut bench, 9, 9));
}

#[test]
fn pages_stay_pinned_until_nobody_reads_them() {
    let closed = SenderInput::ControlClosed { transfer: ONE, finished: false };
    let stopped = SenderInput::SendStopped { transfer: ONE };
    let (unserve, close) =
        (SenderOutput::Unserve { transfer: ONE }, SenderOutput::Close { transfer: ONE });
    let mut bench = Bench::asked();
    bench.ready(20..23);
    // Two are being read, one is not.
    assert_eq!(bench.give(closed.clone()), [unserve, close, unpin(22..23)]);
    assert_eq!((bench.sender.promised(), bench.sender.next_deadline()), (5, None));
    // What was filled meanwhile goes back at once.
    assert_eq!(bench.ready(23..25), [unpin(23..25)]);
    assert_eq!(bench.give(closed.clone()), []);
    let over = ended(0, SenderOutcome::Closed);
    assert_eq!(bench.give(stopped.clone()), [unpin(20..22), over.clone()]);
    assert!(bench.is_clean());
    assert_eq!(bench.ready(25..26), [unpin(25..26)]);
    // It was sent to its end after all.
    let mut bench = Bench::asked();
    bench.ready(20..22);
    bench.give(closed);
    assert_eq!(bench.sent(0..2), [unpin(20..22), over]);
    // The stream breaks first.
    let mut bench = Bench::asked();
    bench.ready(20..22);
    let out = bench.give(stopped);
    assert_eq!(out[0], unpin(20..22));
    assert_eq!(out.last(), Some(&ended(0, SenderOutcome::Closed)));
    assert!(bench.is_clean());
}

#[test]
fn every_wait_ends() {
    let late = |out: &[SenderOutput]| out.contains(&control(Kind::KV_REFUSAL, &KvRefusal::Late));
    // For the prefill, with signs of life.
    let mut bench = Bench::asked();
    for now in (50..1000).step_by(50) {
        assert_eq!(bench.sender.next_deadline(), Some(at(now)));
        bench.now = at(now);
        let progress = control(Kind::KV_PROGRESS, &KvProgress { ready: 0 });
        assert_eq!(bench.give(SenderInput::Timer), [progress]);
    }
    bench.now = at(1000);
    let out = bench.give(SenderInput::Timer);
    assert!(late(&out) && bench.is_clean(), "{out:?}");
    // For the path: the pages stay pinned until the shell has stopped.
    let mut bench = Bench::asked();
    bench.now = at(10);
    bench.ready(20..22);
    bench.now = at(310);
    let out = bench.give(SenderInput::Timer);
    assert!(late(&out) && !out.contains(&unpin(20..22)), "{out:?}");
    assert_eq!(bench.give(SenderInput::SendStopped { transfer: ONE })[0], unpin(20..22));
    // For the receiver's last word, holding nothing.
    let mut bench = Bench::asked();
    bench.ready(20..22);
    bench.sent(0..2);
    bench.give(SenderInput::Finished { transfer: ONE, first_token: None, cached: 0 });
    bench.now = at(1000);
    let out = bench.give(SenderInput::Timer);
    assert!(late(&out) && bench.is_clean(), "{out:?}");
    // No ask is served for longer than this node likes.
    let mut bench = Bench::new();
    bench.ask(1, &KvAsk { deadline_ms: u32::MAX, ..ask(5) });
    bench.now = at(5000);
    assert!(late(&bench.give(SenderInput::Timer)));
}

#[test]
fn a_receiver_that_talks_is_refused() {
    let mut bench = Bench::asked();
    let frame = Frame { kind: Kind(Kind::OPTIONAL | 1), body: Vec::new() };
    assert_eq!(bench.give(SenderInput::Control { transfer: ONE, frame }), []);
    let frame = Frame::new(Kind::KV_ASK, &ask(5));
    let out = bench.give(SenderInput::Control { transfer: ONE, frame });
    assert_eq!(out[0], control(Kind::KV_REFUSAL, &KvRefusal::Protocol));
    assert!(bench.is_clean());
}
