//! The sending side's shell: prefills for peers, pages into streams.

use std::collections::BTreeMap;

use cache::transfer::{BlockDigest, Sender, SenderInput, SenderOutput, Served, TransferId};
use cache::{BlockHash, BlockId, Committed};
use protocol::frame::{Frame, Kind};
use protocol::transfer::{KvFirstToken, KvRefusal, KvWork};
use protocol::{Instant, SequenceId, TenantId, wire};

use super::model::{Prompt, digest};
use super::node::{Job, KvNode, MachineInput, Sabotage};
use super::receive::Payload;
use crate::streams::StreamRef;

pub(super) struct Prefill {
    pub sender: Sender,
    /// Control streams of transfers that are not closed.
    pub controls: BTreeMap<StreamRef, TransferId>,
    /// Their data streams.
    pub data: BTreeMap<StreamRef, TransferId>,
    pub works: BTreeMap<TransferId, Work>,
    outgoing: BTreeMap<TransferId, Outgoing>,
    /// Pins that the sabotaged shell has given back too early.
    unpinned: Vec<BlockId>,
    made: u64,
}

/// What the pool's owner does for a transfer.
pub(super) struct Work {
    served: Served,
    /// With a prompt: its blocks from the first one on, as far as they are filled.
    held: Vec<BlockId>,
    names: Vec<BlockHash>,
    filling: Vec<BlockId>,
    prompt: Option<Prompt>,
    /// Of the wanted blocks, those pinned for the sender.
    pinned: usize,
}

struct Outgoing {
    control: StreamRef,
    /// Of the ask.
    deadline: Instant,
    data: Option<StreamRef>,
    finished: bool,
    attempt: u64,
    order: Option<Order>,
}

/// A chunk on its way into the stream.
struct Order {
    blocks: Vec<BlockId>,
    names: Vec<BlockHash>,
    digests: Vec<BlockDigest>,
    /// A page is being read at this moment.
    reading: bool,
    stop: bool,
}

impl Prefill {
    pub fn new(sender: Sender) -> Self {
        Prefill {
            sender,
            controls: BTreeMap::new(),
            data: BTreeMap::new(),
            works: BTreeMap::new(),
            outgoing: BTreeMap::new(),
            unpinned: Vec::new(),
            made: 0,
        }
    }

    /// A number for a new control stream.
    pub fn begin(&mut self, control: StreamRef, deadline: Instant) -> TransferId {
        self.made += 1;
        let transfer = TransferId(self.made);
        let (data, finished, attempt, order) = (None, false, 0, None);
        let outgoing = Outgoing { control, deadline, data, finished, attempt, order };
        self.outgoing.insert(transfer, outgoing);
        self.controls.insert(control, transfer);
        transfer
    }
}

impl KvNode {
    pub(super) fn do_sender(&mut self, output: SenderOutput) {
        match output {
            SenderOutput::Control { transfer, frame } => {
                if let Some(outgoing) = self.prefill.outgoing.get(&transfer) {
                    let stream = outgoing.control;
                    self.streams.write(self.now, stream, frame.encode(), &mut self.out);
                }
            }
            SenderOutput::Serve { transfer, served } => {
                let work = Work {
                    served,
                    held: Vec::new(),
                    names: Vec::new(),
                    filling: Vec::new(),
                    prompt: None,
                    pinned: 0,
                };
                self.prefill.works.insert(transfer, work);
                self.after(0.3, Job::Serve { transfer });
            }
            SenderOutput::Unserve { transfer } => self.end_work(transfer),
            SenderOutput::OpenData { transfer, header, .. } => {
                let Some(outgoing) = self.prefill.outgoing.get_mut(&transfer) else { return };
                outgoing.attempt = header.attempt;
                outgoing.data = self.streams.open_one_way(outgoing.control);
                if let Some(data) = outgoing.data {
                    self.prefill.data.insert(data, transfer);
                    let frame = Frame::new(Kind::KV_STREAM, &header);
                    self.streams.write(self.now, data, frame.encode(), &mut self.out);
                }
            }
            SenderOutput::SendChunk { transfer, frame, blocks, names } => {
                if self.sabotaged(Sabotage::UnpinBeforeSent) {
                    self.store.release(blocks.iter().copied());
                    self.prefill.unpinned.extend(&blocks);
                }
                let Some(outgoing) = self.prefill.outgoing.get_mut(&transfer) else { return };
                if let Some(data) = outgoing.data {
                    self.streams.write(self.now, data, frame.encode(), &mut self.out);
                }
                let (digests, reading, stop) = (Vec::new(), false, false);
                outgoing.order = Some(Order { blocks, names, digests, reading, stop });
                self.send_next(transfer);
            }
            SenderOutput::SendCommit { transfer, frame, last } => {
                let Some(outgoing) = self.prefill.outgoing.get_mut(&transfer) else { return };
                let Some(data) = outgoing.data else { return };
                outgoing.finished = last;
                self.streams.write(self.now, data, frame.encode(), &mut self.out);
                if last {
                    self.prefill.data.remove(&data);
                    self.streams.finish(self.now, data, &mut self.out);
                }
            }
            SenderOutput::Unpin { blocks } => self.unpin(blocks),
            SenderOutput::Close { transfer } => self.close_transfer(transfer),
            SenderOutput::Ended { .. } => {}
        }
    }

    /// Control streams that are open after the time of their ask.
    pub(super) fn overdue_transfers(&self) -> usize {
        let outgoing = self.prefill.controls.values().filter_map(|t| self.prefill.outgoing.get(t));
        outgoing.filter(|outgoing| outgoing.deadline <= self.now).count()
    }

    fn unpin(&mut self, blocks: Vec<BlockId>) {
        if self.sabotaged(Sabotage::NeverFree) {
            return;
        }
        let unpinned = &mut self.prefill.unpinned;
        let pinned = blocks.into_iter().filter(|block| {
            let early = unpinned.iter().position(|other| other == block);
            early.map(|at| unpinned.swap_remove(at)).is_none()
        });
        let pinned: Vec<BlockId> = pinned.collect();
        self.store.release(pinned.into_iter());
    }

    fn close_transfer(&mut self, transfer: TransferId) {
        let outlives = self.sabotaged(Sabotage::ReaderOutlivesStop);
        let Some(outgoing) = self.prefill.outgoing.get_mut(&transfer) else { return };
        let (control, finished) = (outgoing.control, outgoing.finished);
        let data = outgoing.data.take();
        let stopped = match &mut outgoing.order {
            Some(order) => {
                order.stop = true;
                !order.reading || outlives
            }
            None => false,
        };
        let over = outgoing.order.is_none() || stopped;
        self.prefill.controls.remove(&control);
        self.streams.finish(self.now, control, &mut self.out);
        if let Some(data) = data.filter(|_| !finished) {
            self.prefill.data.remove(&data);
            self.streams.reset(self.now, data, &mut self.out);
        }
        if stopped {
            self.tell_sender(SenderInput::SendStopped { transfer });
        }
        if over {
            self.prefill.outgoing.remove(&transfer);
        }
    }

    /// Begins to copy the next page of a chunk into its stream.
    pub(super) fn send_next(&mut self, transfer: TransferId) {
        let Some(outgoing) = self.prefill.outgoing.get_mut(&transfer) else { return };
        let blocked = outgoing.data.is_some_and(|data| self.streams.is_blocked(data));
        let Some(order) = outgoing.order.as_mut().filter(|order| !order.stop) else { return };
        if blocked {
            self.ledger.count(|counts| counts.blocked += 1);
            return self.after(2.0, Job::SendRetry { transfer });
        }
        order.reading = true;
        let block = order.blocks[order.digests.len()];
        self.store.begin_read(block);
        self.after(0.4, Job::ReadEnd { transfer, block });
    }

    pub(super) fn read_ended(&mut self, transfer: TransferId, block: BlockId) {
        let (mut bytes, tenant) = self.store.end_read(block);
        let Some(outgoing) = self.prefill.outgoing.get_mut(&transfer) else { return };
        let Some(order) = &mut outgoing.order else { return };
        order.reading = false;
        if order.stop {
            self.prefill.outgoing.remove(&transfer);
            return self.tell_sender(SenderInput::SendStopped { transfer });
        }
        let name = order.names[order.digests.len()];
        order.digests.push(digest(&name, &bytes));
        if self.random.unit() < self.setup.trouble.get() {
            bytes[self.random.below(bytes.len())] ^= 1 << self.random.below(8);
        }
        let tenant = tenant.unwrap_or_else(TenantId::local).as_str().to_owned();
        let payload = Payload { bytes, tenant, attempt: outgoing.attempt };
        let done = order.digests.len() == order.blocks.len();
        let data = outgoing.data;
        let order = if done { outgoing.order.take() } else { None };
        if let Some(data) = data {
            self.streams.write(self.now, data, wire::encode(&payload), &mut self.out);
        }
        match order {
            Some(Order { digests, .. }) => {
                self.tell_sender(SenderInput::Sent { transfer, digests });
            }
            None => self.send_next(transfer),
        }
    }

    /// The pool's owner hears of a transfer: it pins what is there, and prefills the rest if asked to.
    pub(super) fn serve(&mut self, transfer: TransferId) {
        let salted = !self.sabotaged(Sabotage::SkipTenant);
        let Some(work) = self.prefill.works.get_mut(&transfer) else { return };
        if let KvWork::Prefill { tenant, tokens, .. } = &work.served.work {
            let tenant = TenantId::new(tenant).expect("checked by the machine");
            let prompt = Prompt { tenant, tokens: tokens.clone() };
            work.names = self.setup.model.names(&prompt, salted);
            work.prompt = Some(prompt);
            let first = work.served.first as usize;
            let wanted = work.names.get(first..first + work.served.names.len());
            if wanted != Some(&work.served.names) {
                return self.decline(transfer, KvRefusal::OtherNames);
            }
            work.held = self.store.pool.match_prefix(&work.names);
            let missing = work.names.len() - work.held.len();
            match self.store.pool.reserve(missing, &mut Vec::new()) {
                Some(blocks) => work.filling = blocks,
                None => return self.decline(transfer, KvRefusal::Busy),
            }
        }
        self.pin_ready(transfer);
        self.prefill_step(transfer);
    }

    fn decline(&mut self, transfer: TransferId, refusal: KvRefusal) {
        self.end_work(transfer);
        self.answer(MachineInput::Sender(SenderInput::Declined { transfer, refusal }));
    }

    /// Pins what the pool has of the wanted blocks, after those that are pinned already.
    fn pin_ready(&mut self, transfer: TransferId) {
        let work = self.prefill.works.get_mut(&transfer).expect("it is at work");
        let blocks = self.store.pool.match_prefix(&work.served.names[work.pinned..]);
        work.pinned += blocks.len();
        if !blocks.is_empty() {
            self.answer(MachineInput::Sender(SenderInput::Ready { transfer, blocks }));
        }
    }

    /// A forward pass fills two blocks, the last one draws the first token.
    pub(super) fn prefill_step(&mut self, transfer: TransferId) {
        let model = self.setup.model;
        let Some(work) = self.prefill.works.get_mut(&transfer) else { return };
        if !self.prefill.outgoing.contains_key(&transfer) {
            self.ledger.broken(self.me, format_args!("a prefill that nobody wants goes on"));
        }
        let Some(prompt) = &work.prompt else {
            self.end_work(transfer);
            let finished = SenderInput::Finished { transfer, first_token: None, cached: 0 };
            return self.answer(MachineInput::Sender(finished));
        };
        if work.held.len() < work.names.len() {
            let contents = model.contents(prompt);
            let step = work.filling.len().min(2);
            for block in work.filling.drain(..step) {
                let at = work.held.len();
                self.store.fill(block, contents[at], &prompt.tenant);
                let owner = SequenceId(transfer.0);
                work.held.push(match self.store.pool.commit(block, work.names[at], owner) {
                    Committed::Indexed => block,
                    Committed::Replaced(canonical) => canonical,
                });
            }
            self.pin_ready(transfer);
            return self.after(self.setup.step_ms, Job::Step { transfer });
        }
        let greedy =
            matches!(work.served.work, KvWork::Prefill { first_token: KvFirstToken::Greedy, .. });
        let first_token = greedy.then(|| model.answer(prompt, 1)[0]);
        self.end_work(transfer);
        self.answer(MachineInput::Sender(SenderInput::Finished {
            transfer,
            first_token,
            cached: 0,
        }));
    }

    fn end_work(&mut self, transfer: TransferId) {
        if let Some(work) = self.prefill.works.remove(&transfer) {
            self.store.release(work.held.into_iter().chain(work.filling));
        }
    }
}
