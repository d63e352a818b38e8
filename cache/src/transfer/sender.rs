//! The side that has the blocks, or prefills them.

use std::collections::{BTreeMap, VecDeque};

use protocol::frame::{Frame, Kind};
use protocol::transfer::{
    KvAsk, KvChunk, KvCommit, KvEnd, KvProgress, KvRefusal, KvStream, KvWork,
};
use protocol::{Duration, Instant, Machine, NodeId, RequestId, TokenId};

use super::{BlockDigest, TransferConfig};
use crate::{BlockHash, BlockId};

/// A control stream that a peer has opened, and the data stream that answers it, as the sender's shell
/// calls them; no number is used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TransferId(pub u64);

/// What the pool's owner is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Served {
    pub peer: NodeId,
    pub request: RequestId,
    /// Position in the sequence of the first of `names`.
    pub first: u32,
    /// Names of the blocks wanted, in order.
    pub names: Vec<BlockHash>,
    /// With `Prefill`, its tokens must give these names under its tenant's salt; if they do not,
    /// `Declined` with [`KvRefusal::OtherNames`].
    pub work: KvWork,
}

/// What a sender is told.
#[derive(Clone, Debug)]
pub enum SenderInput {
    /// The first frame of a control stream that `peer` has opened.
    Asked {
        transfer: TransferId,
        peer: NodeId,
        frame: Frame,
    },
    /// A later frame on it.
    Control {
        transfer: TransferId,
        frame: Frame,
    },
    /// The peer finished its side of the control stream, or reset it, or the connection is lost.
    ControlClosed {
        transfer: TransferId,
        finished: bool,
    },
    /// The next of the wanted blocks, in order, are whole and pinned for this transfer.
    Ready {
        transfer: TransferId,
        blocks: Vec<BlockId>,
    },
    /// No more than were `Ready` will come, of which the first `cached` had been there before.
    Finished {
        transfer: TransferId,
        first_token: Option<TokenId>,
        cached: u32,
    },
    /// No more will come, and not because that was all.
    Declined {
        transfer: TransferId,
        refusal: KvRefusal,
    },
    /// The bytes of a `SendChunk` have left their pages, and this is what they were.
    Sent {
        transfer: TransferId,
        digests: Vec<BlockDigest>,
    },
    /// A `SendChunk` was not done to its end, and nobody reads its pages any more.
    SendStopped {
        transfer: TransferId,
    },
    /// The peer stopped the data stream. If a `SendChunk` was under way, `SendStopped` comes as well.
    DataClosed {
        transfer: TransferId,
    },
    /// This node is shutting down: what is under way may end, nothing new is begun.
    Leave,
    Timer,
}

/// What its shell must do, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SenderOutput {
    /// Send this on the control stream.
    Control { transfer: TransferId, frame: Frame },
    /// Pin the longest beginning of the names that is in the pool, say `Ready`, and if it is to be
    /// prefilled, do so, with `Ready` as blocks are filled. `Finished` or `Declined` at the end.
    Serve { transfer: TransferId, served: Served },
    /// Nobody wants it any more: stop its prefill. What still comes as `Ready` is unpinned.
    Unserve { transfer: TransferId },
    /// Open the data stream and send this, with as many `parts` as streams could be opened at once; no
    /// more than `streams`. What is said of the data stream is said of all of them.
    OpenData { transfer: TransferId, peer: NodeId, header: KvStream, streams: u8 },
    /// Send the frame and then the payloads of these pages on the data stream, digesting each under its
    /// name. Answer `Sent` or `SendStopped`, always and once: until then the pages are being read.
    SendChunk { transfer: TransferId, frame: Frame, blocks: Vec<BlockId>, names: Vec<BlockHash> },
    /// Send this on the data stream, and finish the stream if it is the `last`.
    SendCommit { transfer: TransferId, frame: Frame, last: bool },
    /// Release these: nothing reads them for this transfer any more.
    Unpin { blocks: Vec<BlockId> },
    /// Finish this side of the control stream; reset the data stream if it was not finished. A
    /// `SendChunk` under way ends early.
    Close { transfer: TransferId },
    /// The transfer is over; `sent` blocks were committed.
    Ended { transfer: TransferId, sent: usize, outcome: SenderOutcome },
}

/// How a transfer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SenderOutcome {
    /// The receiver has everything.
    Complete,
    /// The receiver was told so.
    Refused(KvRefusal),
    /// The receiver went away, or does not want the rest.
    Closed,
}

/// The sending side of all transfers of one replica.
#[derive(Debug)]
pub struct Sender {
    config: TransferConfig,
    /// At most `transfers_max`.
    transfers: BTreeMap<TransferId, Transfer>,
    /// Blocks asked for by transfers that may pin them, at most `blocks_pinned_max`.
    promised: usize,
    leaving: bool,
}

#[derive(Debug)]
struct Transfer {
    peer: NodeId,
    stream: KvStream,
    /// Data streams that the receiver would have.
    streams: u8,
    names: Vec<BlockHash>,
    cached_only: bool,
    deadline: Instant,
    progress_due: Instant,
    phase: Phase,
    /// Of the wanted blocks, those that were pinned so far.
    pinned: usize,
    /// Pinned and not yet with the shell.
    ready: VecDeque<BlockId>,
    order: Option<Order>,
    opened: bool,
    /// Of the wanted blocks, those whose commit was sent.
    sent: usize,
    /// No more blocks will be ready.
    end: Option<KvEnd>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Serving,
    /// The last commit was sent; waits for the receiver to say that it has it. Pins nothing.
    Closing,
    /// Over, but its pages are still being read.
    Stopping(SenderOutcome),
}

/// A chunk that the shell is sending.
#[derive(Debug)]
struct Order {
    blocks: Vec<BlockId>,
    deadline: Instant,
}

impl Sender {
    pub fn new(config: TransferConfig) -> Self {
        Sender { config, transfers: BTreeMap::new(), promised: 0, leaving: false }
    }

    /// Transfers that are not over, those included whose pages are still being read.
    pub fn in_flight(&self) -> usize {
        self.transfers.len()
    }

    /// Blocks that transfers in flight have pinned or may yet pin.
    pub fn promised(&self) -> usize {
        self.promised
    }

    fn on_asked(
        &mut self,
        now: Instant,
        (transfer, peer): (TransferId, NodeId),
        frame: &Frame,
        out: &mut Vec<SenderOutput>,
    ) {
        match self.check(peer, frame) {
            Ok(ask) => self.begin(now, (transfer, peer), ask, out),
            Err(refusal) => {
                let frame = Frame::new(Kind::KV_REFUSAL, &refusal);
                out.push(SenderOutput::Control { transfer, frame });
                out.push(SenderOutput::Close { transfer });
                let outcome = SenderOutcome::Refused(refusal);
                out.push(SenderOutput::Ended { transfer, sent: 0, outcome });
            }
        }
    }

    fn check(&self, peer: NodeId, frame: &Frame) -> Result<KvAsk, KvRefusal> {
        let ask = KvAsk::from_frame(frame).map_err(|_| KvRefusal::Protocol)?;
        self.config.format.check(&ask.format)?;
        let max = self.config.blocks_max.min(self.config.blocks_pinned_max);
        if ask.wanted.len() > max {
            return Err(KvRefusal::TooMany { max: max as u32 });
        }
        if matches!(ask.work, KvWork::Prefill { .. }) && !self.config.prefills {
            return Err(KvRefusal::NoPrefill);
        }
        if self.leaving {
            return Err(KvRefusal::Leaving);
        }
        if ask.deadline_ms == 0 {
            return Err(KvRefusal::Late);
        }
        let pinned = self.promised + ask.wanted.len();
        let of_peer = self.transfers.values().filter(|transfer| transfer.peer == peer).count();
        let full = self.transfers.len() >= self.config.transfers_max
            || of_peer >= self.config.transfers_per_peer_max;
        if full || pinned > self.config.blocks_pinned_max {
            return Err(KvRefusal::Busy);
        }
        Ok(ask)
    }

    fn begin(
        &mut self,
        now: Instant,
        (id, peer): (TransferId, NodeId),
        ask: KvAsk,
        out: &mut Vec<SenderOutput>,
    ) {
        let names: Vec<BlockHash> = ask.wanted.iter().copied().map(BlockHash).collect();
        self.promised += names.len();
        let time = Duration::from_millis(ask.deadline_ms.into()).min(self.config.serve_max);
        let transfer = Transfer {
            peer,
            stream: KvStream { request: ask.request, attempt: ask.attempt, parts: 1 },
            streams: ask.streams,
            names: names.clone(),
            cached_only: ask.work == KvWork::Cached,
            deadline: now + time,
            progress_due: now + self.config.progress_interval,
            phase: Phase::Serving,
            pinned: 0,
            ready: VecDeque::new(),
            order: None,
            opened: false,
            sent: 0,
            end: None,
        };
        let before = self.transfers.insert(id, transfer);
        assert!(before.is_none(), "the shell uses no number twice");
        out.push(SenderOutput::Control { transfer: id, frame: Frame::new(Kind::KV_ACCEPT, &()) });
        let request = RequestId(ask.request);
        let served = Served { peer, request, first: ask.first, names, work: ask.work };
        out.push(SenderOutput::Serve { transfer: id, served });
    }

    /// The transfer, if it still sends.
    fn serving(&mut self, id: TransferId) -> Option<&mut Transfer> {
        self.transfers.get_mut(&id).filter(|t| t.phase == Phase::Serving)
    }

    fn on_ready(
        &mut self,
        now: Instant,
        id: TransferId,
        blocks: Vec<BlockId>,
        out: &mut Vec<SenderOutput>,
    ) {
        match self.serving(id) {
            Some(transfer) => {
                transfer.pinned += blocks.len();
                assert!(transfer.pinned <= transfer.names.len(), "no more than were wanted");
                transfer.ready.extend(blocks);
                self.pump(now, id, out);
            }
            None if blocks.is_empty() => {}
            None => out.push(SenderOutput::Unpin { blocks }),
        }
    }

    /// Hands the next chunk to the shell, or says that it was the last.
    fn pump(&mut self, now: Instant, id: TransferId, out: &mut Vec<SenderOutput>) {
        let (chunk_max, send_wait) = (self.config.chunk_blocks_max(), self.config.send_wait);
        let Some(transfer) = self.serving(id) else { return };
        if transfer.order.is_some() {
            return;
        }
        let nothing = transfer.ready.is_empty();
        if nothing && transfer.end.is_none() {
            return;
        }
        if nothing && transfer.pinned == 0 {
            let refusal = if transfer.cached_only { KvRefusal::Absent } else { KvRefusal::Aborted };
            return self.refuse(id, refusal, out);
        }
        if !transfer.opened {
            transfer.opened = true;
            let Transfer { peer, stream: header, streams, .. } = *transfer;
            out.push(SenderOutput::OpenData { transfer: id, peer, header, streams });
        }
        if nothing {
            return self.commit(id, Vec::new(), out);
        }
        let n = transfer.ready.len().min(chunk_max);
        let blocks: Vec<BlockId> = transfer.ready.drain(..n).collect();
        let chunk = KvChunk { first: transfer.sent as u32, blocks: n as u32 };
        let names = transfer.names[transfer.sent..transfer.sent + n].to_vec();
        transfer.order = Some(Order { blocks: blocks.clone(), deadline: now + send_wait });
        let frame = Frame::new(Kind::KV_CHUNK, &chunk);
        out.push(SenderOutput::SendChunk { transfer: id, frame, blocks, names });
    }

    /// Sends the commit record of what was sent last.
    fn commit(&mut self, id: TransferId, digests: Vec<[u8; 32]>, out: &mut Vec<SenderOutput>) {
        let Some(transfer) = self.serving(id) else { return };
        let first = transfer.sent as u32;
        transfer.sent += digests.len();
        let end = transfer.end.filter(|_| transfer.ready.is_empty());
        let last = end.is_some();
        let wanted = transfer.names.len();
        if last {
            transfer.phase = Phase::Closing;
            self.promised -= wanted;
        }
        let frame = Frame::new(Kind::KV_COMMIT, &KvCommit { first, digests, end });
        out.push(SenderOutput::SendCommit { transfer: id, frame, last });
    }

    fn on_sent(
        &mut self,
        now: Instant,
        id: TransferId,
        digests: Vec<BlockDigest>,
        out: &mut Vec<SenderOutput>,
    ) {
        let Some(order) = self.reading_ended(id, out) else { return };
        assert_eq!(digests.len(), order.blocks.len(), "a digest for each block");
        out.push(SenderOutput::Unpin { blocks: order.blocks });
        self.commit(id, digests.into_iter().map(|digest| digest.0).collect(), out);
        self.pump(now, id, out);
    }

    fn on_send_stopped(&mut self, id: TransferId, out: &mut Vec<SenderOutput>) {
        let Some(order) = self.reading_ended(id, out) else { return };
        out.push(SenderOutput::Unpin { blocks: order.blocks });
        self.stop(id, SenderOutcome::Closed, out);
    }

    /// Takes back what the shell was reading. If the transfer was only waiting for that, it is over now
    /// and there is nothing left to do.
    fn reading_ended(&mut self, id: TransferId, out: &mut Vec<SenderOutput>) -> Option<Order> {
        let transfer = self.transfers.get_mut(&id)?;
        let order = transfer.order.take()?;
        let Phase::Stopping(outcome) = transfer.phase else { return Some(order) };
        let sent = transfer.sent;
        self.promised -= transfer.names.len();
        self.transfers.remove(&id);
        out.push(SenderOutput::Unpin { blocks: order.blocks });
        out.push(SenderOutput::Ended { transfer: id, sent, outcome });
        None
    }

    fn refuse(&mut self, id: TransferId, refusal: KvRefusal, out: &mut Vec<SenderOutput>) {
        let stopping = |transfer: &Transfer| matches!(transfer.phase, Phase::Stopping(_));
        if self.transfers.get(&id).is_none_or(stopping) {
            return;
        }
        let frame = Frame::new(Kind::KV_REFUSAL, &refusal);
        out.push(SenderOutput::Control { transfer: id, frame });
        self.stop(id, SenderOutcome::Refused(refusal), out);
    }

    /// Ends a transfer: unpins what is not being read at once, and the rest when it was read.
    fn stop(&mut self, id: TransferId, outcome: SenderOutcome, out: &mut Vec<SenderOutput>) {
        let Some(transfer) = self.transfers.get_mut(&id) else { return };
        let (phase, sent) = (transfer.phase, transfer.sent);
        if matches!(phase, Phase::Stopping(_)) {
            return;
        }
        if phase == Phase::Serving && transfer.end.is_none() {
            out.push(SenderOutput::Unserve { transfer: id });
        }
        out.push(SenderOutput::Close { transfer: id });
        if !transfer.ready.is_empty() {
            let blocks = std::mem::take(&mut transfer.ready).into();
            out.push(SenderOutput::Unpin { blocks });
        }
        if transfer.order.is_some() {
            transfer.phase = Phase::Stopping(outcome);
            return;
        }
        if phase == Phase::Serving {
            self.promised -= transfer.names.len();
        }
        self.transfers.remove(&id);
        out.push(SenderOutput::Ended { transfer: id, sent, outcome });
    }

    fn on_control_closed(&mut self, id: TransferId, finished: bool, out: &mut Vec<SenderOutput>) {
        let Some(transfer) = self.transfers.get(&id) else { return };
        let all = transfer.phase == Phase::Closing || transfer.sent == transfer.names.len();
        let outcome = match finished && all {
            true => SenderOutcome::Complete,
            false => SenderOutcome::Closed,
        };
        self.stop(id, outcome, out);
    }

    fn on_timer(&mut self, now: Instant, out: &mut Vec<SenderOutput>) {
        let interval = self.config.progress_interval;
        let due: Vec<TransferId> = self
            .transfers
            .iter()
            .filter(|(_, transfer)| transfer.due().is_some_and(|due| due <= now))
            .map(|(id, _)| *id)
            .collect();
        for id in due {
            let transfer = self.transfers.get_mut(&id).expect("it is due");
            if now >= transfer.gives_up() {
                self.refuse(id, KvRefusal::Late, out);
                continue;
            }
            transfer.progress_due = now + interval;
            let progress = KvProgress { ready: transfer.pinned as u32 };
            let frame = Frame::new(Kind::KV_PROGRESS, &progress);
            out.push(SenderOutput::Control { transfer: id, frame });
        }
    }
}

impl Transfer {
    /// When its present wait has lasted too long.
    fn gives_up(&self) -> Instant {
        self.order.as_ref().map_or(self.deadline, |order| order.deadline.min(self.deadline))
    }

    fn due(&self) -> Option<Instant> {
        match self.phase {
            Phase::Serving | Phase::Closing => Some(self.gives_up().min(self.progress_due)),
            Phase::Stopping(_) => None,
        }
    }
}

impl Machine for Sender {
    type Input = SenderInput;
    type Output = SenderOutput;

    fn handle(&mut self, now: Instant, input: SenderInput, out: &mut Vec<SenderOutput>) {
        match input {
            SenderInput::Asked { transfer, peer, frame } => {
                self.on_asked(now, (transfer, peer), &frame, out);
            }
            // The receiver has nothing more to say than that it is done.
            SenderInput::Control { frame, .. } if frame.kind.is_optional() => {}
            SenderInput::Control { transfer, .. } => {
                self.refuse(transfer, KvRefusal::Protocol, out);
            }
            SenderInput::ControlClosed { transfer, finished } => {
                self.on_control_closed(transfer, finished, out);
            }
            SenderInput::Ready { transfer, blocks } => self.on_ready(now, transfer, blocks, out),
            SenderInput::Finished { transfer, first_token, cached } => {
                if let Some(serving) = self.serving(transfer) {
                    serving.end = Some(KvEnd { first_token, cached });
                    self.pump(now, transfer, out);
                }
            }
            SenderInput::Declined { transfer, refusal } => {
                if let Some(serving) = self.serving(transfer) {
                    // Nothing is left to be stopped.
                    serving.end = Some(KvEnd { first_token: None, cached: 0 });
                    self.refuse(transfer, refusal, out);
                }
            }
            SenderInput::Sent { transfer, digests } => self.on_sent(now, transfer, digests, out),
            SenderInput::SendStopped { transfer } => self.on_send_stopped(transfer, out),
            SenderInput::DataClosed { transfer } => {
                if self.serving(transfer).is_some() {
                    self.stop(transfer, SenderOutcome::Closed, out);
                }
            }
            SenderInput::Leave => self.leaving = true,
            SenderInput::Timer => self.on_timer(now, out),
        }
    }

    /// O(transfers in flight).
    fn next_deadline(&self) -> Option<Instant> {
        self.transfers.values().filter_map(Transfer::due).min()
    }
}
