//! Peers that say anything at any time, to shells that keep their word: nothing is attached that was not
//! verified, and every block comes back once, when nobody writes or reads it.

use std::collections::{BTreeMap, BTreeSet};

use cache::transfer::{
    AttemptId, HandOff, Receiver, ReceiverInput, ReceiverOutput, Sender, SenderInput, SenderOutput,
    Source, StreamId, TransferId,
};
use proptest::prelude::*;
use protocol::frame::{Frame, Kind};
use protocol::transfer::{KvAsk, KvRefusal};
use protocol::{Machine, RequestId};

use super::*;

/// What happens next. Numbers choose among what is possible.
#[derive(Clone, Debug)]
enum Step {
    /// Of the receiver's user, or the sender's pool.
    Local(u8),
    /// Of the peer, on one of the streams.
    Frame(u8, Said),
    /// A stream ends.
    Closed(u8),
    /// The data's reader or writer is done, or has stopped.
    Done(u8),
    Stopped(u8),
    /// Milliseconds pass.
    Time(u16),
}

#[derive(Clone, Debug)]
enum Said {
    Header(u64),
    Chunk(u32, u32),
    Commit(u32, u8, u8, bool),
    Accept,
    Refusal,
    Noise(u16, Vec<u8>),
}

impl Said {
    fn frame(&self) -> Frame {
        match self {
            Said::Header(attempt) => header(REQUEST, *attempt),
            Said::Chunk(first, n) => chunk(*first, *n),
            Said::Commit(first, from, n, end) => {
                commit(*first, *from..from.saturating_add(*n), end.then_some(None))
            }
            Said::Accept => Frame::new(Kind::KV_ACCEPT, &()),
            Said::Refusal => Frame::new(Kind::KV_REFUSAL, &KvRefusal::Busy),
            Said::Noise(kind, body) => Frame { kind: Kind(*kind), body: body.clone() },
        }
    }
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let noise = (40..60u16, proptest::collection::vec(any::<u8>(), 0..6));
    let said = prop_oneof![
        3 => (0..4u64).prop_map(Said::Header),
        4 => (0..4u32, 1..4u32).prop_map(|(first, n)| Said::Chunk(first, n)),
        4 => (0..4u32, 0..4u8, 0..4u8, any::<bool>())
            .prop_map(|(first, from, n, end)| Said::Commit(first, from, n, end)),
        2 => Just(Said::Accept),
        1 => Just(Said::Refusal),
        1 => noise.prop_map(|(kind, body)| Said::Noise(kind, body)),
    ];
    let step = prop_oneof![
        4 => any::<u8>().prop_map(Step::Local),
        8 => (any::<u8>(), said).prop_map(|(stream, said)| Step::Frame(stream, said)),
        1 => any::<u8>().prop_map(Step::Closed),
        5 => any::<u8>().prop_map(Step::Done),
        1 => any::<u8>().prop_map(Step::Stopped),
        1 => (0..400u16).prop_map(Step::Time),
    ];
    proptest::collection::vec(step, 0..120)
}

/// A receiver, and a shell that remembers who may have which block.
struct Receiving {
    receiver: Receiver,
    now: u64,
    /// Blocks that the receiver was given and has not given back.
    held: BTreeSet<BlockId>,
    writes: BTreeMap<StreamId, Vec<BlockId>>,
    /// By stream: blocks written, and under which digests.
    written: BTreeMap<StreamId, (Vec<BlockId>, std::ops::Range<u8>)>,
    reserving: Vec<(RequestId, usize)>,
    given: u32,
    ended: BTreeSet<RequestId>,
}

impl Receiving {
    fn give(&mut self, input: ReceiverInput) {
        let verified = self.verified_by(&input);
        let mut out = Vec::new();
        self.receiver.handle(at(self.now), input, &mut out);
        for output in out {
            match output {
                ReceiverOutput::Reserve { request, blocks } => {
                    self.reserving.push((request, blocks));
                }
                ReceiverOutput::Write { stream, blocks, .. } => {
                    assert!(blocks.iter().all(|block| self.held.contains(block)), "not its own");
                    let all = self.writes.values().flatten();
                    let mut all: Vec<_> = all.chain(&blocks).collect();
                    all.sort_unstable();
                    assert!(all.windows(2).all(|pair| pair[0] != pair[1]), "two writers");
                    assert!(self.writes.insert(stream, blocks).is_none(), "two on one stream");
                }
                ReceiverOutput::Attach { request, blocks } => {
                    assert!(!self.ended.contains(&request), "attached after the end");
                    let blocks: Vec<_> = blocks.into_iter().map(|(block, _)| block).collect();
                    assert_eq!(Some(&blocks), verified.as_ref(), "not what was verified");
                    blocks.iter().for_each(|block| self.give_back(block));
                }
                ReceiverOutput::Free { blocks } => {
                    blocks.iter().for_each(|block| self.give_back(block));
                }
                ReceiverOutput::Ended { request, .. } => {
                    assert!(self.ended.insert(request), "ended twice");
                }
                ReceiverOutput::Ask { frame, .. } => {
                    KvAsk::from_frame(&frame).expect("its asks are sound");
                }
                ReceiverOutput::Stop { .. }
                | ReceiverOutput::Close { .. }
                | ReceiverOutput::Attempted { .. } => {}
            }
        }
        assert!(self.receiver.in_flight() <= 2);
    }

    /// The blocks that this commit verifies, if all is right with it.
    fn verified_by(&mut self, input: &ReceiverInput) -> Option<Vec<BlockId>> {
        let ReceiverInput::Data { stream, frame, .. } = input else { return None };
        let commit = protocol::transfer::KvCommit::from_frame(frame).ok()?;
        let (blocks, digests) = self.written.remove(stream)?;
        let right = digests.map(|n| digest(n).0).eq(commit.digests.iter().copied());
        right.then_some(blocks)
    }

    fn give_back(&mut self, block: &BlockId) {
        assert!(self.held.remove(block), "{block:?} was not its own");
        let written = self.writes.values().flatten().any(|other| other == block);
        assert!(!written, "{block:?} is still being written");
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Local(n) if !self.reserving.is_empty() => {
                let at = *n as usize % self.reserving.len();
                let (request, n_blocks) = self.reserving.swap_remove(at);
                let n_blocks = if n % 8 == 7 { 0 } else { n_blocks as u32 };
                let blocks = blocks(self.given..self.given + n_blocks);
                self.given += n_blocks;
                self.held.extend(&blocks);
                self.give(ReceiverInput::Reserved { request, blocks });
            }
            Step::Local(n) if n % 4 == 3 => {
                self.give(ReceiverInput::Cancel { request: REQUEST });
            }
            Step::Local(n) => {
                self.ended.remove(&REQUEST);
                let sources =
                    (1..2 + n % 3).map(|n| Source { peer: node(n), prefill: n > 1, streams: 1 });
                let (sources, deadline) = (sources.collect(), at(self.now + 1000));
                let handoff = HandOff { sources, deadline, ..handoff(1 + n % 6) };
                // A second one of the same request would only be rejected, which ends nothing.
                if self.receiver.next_deadline().is_none() {
                    self.give(ReceiverInput::Start(handoff));
                }
            }
            Step::Frame(n, said) => {
                let frame = said.frame();
                let control = matches!(said, Said::Accept | Said::Refusal) || n % 16 == 15;
                if control {
                    let attempt = AttemptId(u64::from(n % 4));
                    return self.give(ReceiverInput::Control { attempt, frame });
                }
                let stream = StreamId(u64::from(n % 3));
                // The shell does not read on while it writes.
                if !self.writes.contains_key(&stream) {
                    let peer = node(1 + n / 3 % 2);
                    self.give(ReceiverInput::Data { stream, peer, frame });
                }
            }
            Step::Closed(n) if n % 2 == 0 => {
                self.give(ReceiverInput::ControlClosed { attempt: AttemptId(u64::from(n % 4)) });
            }
            Step::Closed(n) => {
                let stream = StreamId(u64::from(n % 3));
                if self.writes.remove(&stream).is_some() {
                    self.give(ReceiverInput::WriteStopped { stream });
                }
                self.give(ReceiverInput::DataClosed { stream });
            }
            Step::Done(n) => {
                let stream = StreamId(u64::from(n % 3));
                let Some(blocks) = self.writes.remove(&stream) else { return };
                let from = n / 3 % 4;
                let digests = from..from + blocks.len() as u8;
                self.written.insert(stream, (blocks, digests.clone()));
                let digests = digests.map(digest).collect();
                self.give(ReceiverInput::Written { stream, digests });
            }
            Step::Stopped(n) => {
                let stream = StreamId(u64::from(n % 3));
                if self.writes.remove(&stream).is_some() {
                    self.give(ReceiverInput::WriteStopped { stream });
                }
            }
            Step::Time(millis) => {
                self.now += u64::from(*millis);
                self.give(ReceiverInput::Timer);
                let due = self.receiver.next_deadline();
                assert!(due.is_none_or(|due| due > at(self.now)), "a wait has no end");
            }
        }
    }
}

/// A sender, and a shell that remembers who may have which block.
struct Sending {
    sender: Sender,
    now: u64,
    pinned: BTreeSet<BlockId>,
    /// By transfer: blocks still wanted of the pool.
    serves: BTreeMap<TransferId, usize>,
    orders: BTreeMap<TransferId, Vec<BlockId>>,
    open: BTreeSet<TransferId>,
    given: u32,
    transfers: u64,
}

impl Sending {
    fn give(&mut self, input: SenderInput) {
        let mut out = Vec::new();
        self.sender.handle(at(self.now), input, &mut out);
        for output in out {
            match output {
                SenderOutput::Serve { transfer, served } => {
                    self.serves.insert(transfer, served.names.len());
                }
                SenderOutput::Unserve { transfer } => {
                    self.serves.remove(&transfer).expect("it was served");
                }
                SenderOutput::SendChunk { transfer, blocks, .. } => {
                    assert!(self.open.contains(&transfer), "sent on a closed stream");
                    assert!(blocks.iter().all(|block| self.pinned.contains(block)));
                    assert!(self.orders.insert(transfer, blocks).is_none(), "one at a time");
                }
                SenderOutput::Unpin { blocks } => {
                    for block in blocks {
                        assert!(self.pinned.remove(&block), "{block:?} was not pinned");
                        let read = self.orders.values().flatten().any(|other| *other == block);
                        assert!(!read, "{block:?} is still being read");
                    }
                }
                SenderOutput::Close { transfer } => {
                    assert!(self.open.remove(&transfer), "closed twice");
                }
                SenderOutput::Control { transfer, .. }
                | SenderOutput::OpenData { transfer, .. }
                | SenderOutput::SendCommit { transfer, .. } => {
                    assert!(self.open.contains(&transfer), "said on a closed stream");
                }
                SenderOutput::Ended { transfer, .. } => {
                    assert!(!self.open.contains(&transfer) && !self.orders.contains_key(&transfer));
                }
            }
        }
        assert!(self.sender.in_flight() <= 2 && self.sender.promised() <= 10);
    }

    fn transfer(&self, n: u8) -> TransferId {
        TransferId(self.transfers.saturating_sub(u64::from(n % 3)))
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Local(n) if n % 3 > 0 => {
                let transfer = self.transfer(n / 3);
                let Some(left) = self.serves.get_mut(&transfer) else { return };
                match n % 16 {
                    14 => {
                        self.serves.remove(&transfer);
                        self.give(SenderInput::Finished { transfer, first_token: None, cached: 0 });
                    }
                    13 => {
                        self.serves.remove(&transfer);
                        let refusal = KvRefusal::OtherNames;
                        self.give(SenderInput::Declined { transfer, refusal });
                    }
                    n => {
                        let some = (*left).min(usize::from(n % 4));
                        *left -= some;
                        let blocks = blocks(self.given..self.given + some as u32);
                        self.given += some as u32;
                        self.pinned.extend(&blocks);
                        self.give(SenderInput::Ready { transfer, blocks });
                    }
                }
            }
            Step::Local(n) | Step::Frame(n, Said::Header(_)) => {
                self.transfers += 1;
                let transfer = TransferId(self.transfers);
                self.open.insert(transfer);
                let wanted = (0..n % 10).map(|n| name(n).0).collect();
                let ask = KvAsk {
                    request: 1,
                    attempt: 0,
                    format: format(),
                    first: 0,
                    wanted,
                    deadline_ms: 700,
                    streams: 1,
                    work: if n % 2 == 0 { KvWork::Cached } else { prefill() },
                };
                let frame = Frame::new(Kind::KV_ASK, &ask);
                self.give(SenderInput::Asked { transfer, peer: node(1), frame });
            }
            Step::Frame(n, said) if n % 4 == 0 => {
                let (transfer, frame) = (self.transfer(*n), said.frame());
                self.give(SenderInput::Control { transfer, frame });
            }
            Step::Frame(..) => {}
            Step::Closed(n) => {
                let transfer = self.transfer(n / 4);
                match n % 4 {
                    0 => self.give(SenderInput::DataClosed { transfer }),
                    n => self.give(SenderInput::ControlClosed { transfer, finished: n == 1 }),
                }
            }
            Step::Done(n) => {
                let transfer = self.transfer(*n);
                let Some(blocks) = self.orders.remove(&transfer) else { return };
                let digests = blocks.iter().map(|_| digest(0)).collect();
                self.give(SenderInput::Sent { transfer, digests });
            }
            Step::Stopped(n) => {
                let transfer = self.transfer(*n);
                if self.orders.remove(&transfer).is_some() {
                    self.give(SenderInput::SendStopped { transfer });
                }
            }
            Step::Time(millis) => {
                self.now += u64::from(*millis);
                self.give(SenderInput::Timer);
                let due = self.sender.next_deadline();
                assert!(due.is_none_or(|due| due > at(self.now)), "a wait has no end");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..Default::default() })]

    #[test]
    fn a_receiver_gives_every_block_back_once(steps in steps()) {
        let mut shell = Receiving {
            receiver: Receiver::new(config()),
            now: 0,
            held: BTreeSet::new(),
            writes: BTreeMap::new(),
            written: BTreeMap::new(),
            reserving: Vec::new(),
            given: 0,
            ended: BTreeSet::new(),
        };
        for step in &steps {
            shell.step(step);
        }
        // The shell answers what is open, and time passes.
        while !shell.reserving.is_empty() {
            shell.step(&Step::Local(0));
        }
        shell.give(ReceiverInput::Cancel { request: REQUEST });
        for stream in 0..3 {
            shell.step(&Step::Stopped(stream));
        }
        prop_assert_eq!((shell.held.len(), shell.receiver.in_flight()), (0, 0));
        prop_assert_eq!(shell.receiver.next_deadline(), None);
    }

    #[test]
    fn a_sender_unpins_every_block_once(steps in steps()) {
        let mut shell = Sending {
            sender: Sender::new(config()),
            now: 0,
            pinned: BTreeSet::new(),
            serves: BTreeMap::new(),
            orders: BTreeMap::new(),
            open: BTreeSet::new(),
            given: 0,
            transfers: 0,
        };
        for step in &steps {
            shell.step(step);
        }
        shell.step(&Step::Time(u16::MAX));
        let orders: Vec<TransferId> = shell.orders.keys().copied().collect();
        for transfer in orders {
            shell.orders.remove(&transfer);
            shell.give(SenderInput::SendStopped { transfer });
        }
        prop_assert_eq!((shell.pinned.len(), shell.sender.in_flight()), (0, 0));
        prop_assert_eq!((shell.sender.promised(), shell.sender.next_deadline()), (0, None));
    }
}
