//! A node that decodes and prefills: the shell around both machines, as thin as the daemon's must be,
//! with jobs that take time where the daemon has threads.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;

use cache::transfer::{
    Receiver, ReceiverInput, Sender, SenderInput, StreamId, TransferConfig, TransferId,
};
use protocol::frame::Frame;
use protocol::random::Random;
use protocol::transfer::{KV_FRAME_BYTES_MAX, KvAsk};
use protocol::{Duration, Instant, Machine, NodeId, RequestId};

use super::ledger::Ledger;
use super::model::{Model, Prompt};
use super::prefill::Prefill;
use super::receive::{Payload, Receive};
use super::store::Store;
use crate::actor::{Actor, Effect, NodeIndex, Stimulus};
use crate::streams::{Item, StreamEvent, StreamRef, Streams};
use crate::world::Birth;

/// What a client wants of a node.
#[derive(Clone, Debug)]
pub enum Command {
    Generate {
        request: RequestId,
        prompt: Prompt,
        /// Peers to ask, and whether each shall prefill.
        sources: Vec<(NodeIndex, bool)>,
        /// Time for the hand-off.
        wait: Duration,
        /// Whether the first token is the sender's.
        greedy: bool,
    },
    Cancel {
        request: RequestId,
    },
}

/// What a node is made of.
#[derive(Clone, Debug)]
pub struct NodeSetup {
    pub model: Model,
    /// Blocks of its pool.
    pub capacity: u32,
    /// Time for two blocks of a prefill for a peer, milliseconds; half to one and a half of it.
    pub step_ms: f64,
    /// The shell does one thing wrong.
    pub sabotage: Option<Sabotage>,
    /// While set: this share of payloads changes on the way, and work has hiccups.
    pub trouble: Rc<Cell<f64>>,
}

/// What a shell could do wrong, to see that the oracles notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sabotage {
    /// Takes every commit for verified.
    AttachUnverified,
    /// Reads pages as soon as their bytes are there.
    ReadBeforeCommit,
    /// Takes a late data stream of a request for the present attempt's.
    IgnoreAttempt,
    /// Leaves the tenant out of block names.
    SkipTenant,
    /// Says that a writer has stopped while it still writes.
    WriterOutlivesStop,
    /// Says that a reader has stopped while it still reads.
    ReaderOutlivesStop,
    /// Unpins when sending begins.
    UnpinBeforeSent,
    /// Never tells the machines that time has passed.
    DeafToTimers,
    /// Never gives the blocks of a finished sequence back.
    KeepBlocks,
    /// Drops what it is told to free or unpin.
    NeverFree,
}

/// A node in the world.
pub struct KvNode {
    pub(super) me: NodeIndex,
    pub(super) setup: NodeSetup,
    pub(super) ledger: Ledger,
    pub(super) random: Random,
    pub(super) now: Instant,
    pub(super) out: Vec<Effect>,
    pub(super) streams: Streams,
    pub(super) store: Store,
    pub(super) inputs: VecDeque<MachineInput>,
    pub(super) receive: Receive,
    pub(super) prefill: Prefill,
    /// Control streams that were ever opened here, by whichever side.
    pub(super) controls_seen: BTreeSet<StreamRef>,
    jobs: BTreeMap<(Instant, u64), Job>,
    made: u64,
    commands: VecDeque<Command>,
    readable: VecDeque<(StreamRef, NodeIndex)>,
    /// When the last answer of the pool's owner arrives: they keep their order.
    told_at: Instant,
    /// Data streams that were left unread once.
    late: BTreeSet<StreamRef>,
    transfers_max: usize,
}

#[derive(Clone, Debug)]
pub(super) enum MachineInput {
    Receiver(ReceiverInput),
    Sender(SenderInput),
}

/// Work that takes time.
#[derive(Clone, Debug)]
pub(super) enum Job {
    /// Ask the pool's owner for room.
    Reserve { request: RequestId, blocks: usize },
    /// The payload is in its page.
    WriteEnd { stream: StreamId, block: cache::BlockId, payload: Payload },
    /// A local prefill is done.
    Fill { request: RequestId },
    /// Look again whether there is room.
    Retry { request: RequestId },
    /// The next token.
    Decode { request: RequestId },
    /// The pool's owner hears of a transfer.
    Serve { transfer: TransferId },
    /// A step of a prefill for a peer.
    Step { transfer: TransferId },
    /// A page has been copied into the stream.
    ReadEnd { transfer: TransferId, block: cache::BlockId },
    /// The stream had no room.
    SendRetry { transfer: TransferId },
    /// An answer of the pool's owner arrives.
    Tell(MachineInput),
    /// A data stream that was left unread for a while.
    Read { stream: StreamRef, peer: NodeIndex },
}

impl KvNode {
    pub fn new(setup: NodeSetup, ledger: Ledger, birth: Birth) -> Self {
        let config = TransferConfig {
            transfers_max: 4,
            blocks_max: 64,
            blocks_pinned_max: setup.capacity as usize,
            // Two blocks.
            chunk_bytes_max: 2 * setup.model.format().block_bytes as usize,
            answer_wait: Duration::from_millis(400),
            silence_max: Duration::from_millis(700),
            progress_interval: Duration::from_millis(150),
            send_wait: Duration::from_secs(1),
            serve_max: Duration::from_secs(5),
            ..TransferConfig::new(setup.model.format(), setup.capacity as usize)
        };
        let mut random = Random::new(birth.seed);
        KvNode {
            me: birth.node,
            ledger: ledger.clone(),
            streams: Streams::new(random.next_u64()),
            random,
            now: Instant::ORIGIN,
            out: Vec::new(),
            store: Store::new(setup.capacity, birth.node, ledger),
            inputs: VecDeque::new(),
            transfers_max: config.transfers_max,
            receive: Receive::new(Receiver::new(config.clone())),
            prefill: Prefill::new(Sender::new(config)),
            controls_seen: BTreeSet::new(),
            jobs: BTreeMap::new(),
            made: 0,
            commands: VecDeque::new(),
            readable: VecDeque::new(),
            told_at: Instant::ORIGIN,
            late: BTreeSet::new(),
            setup,
        }
    }

    /// Leaves a command for the node; the world must then look at its timer.
    pub fn command(&mut self, command: Command) {
        self.commands.push_back(command);
    }

    /// What it still holds although nothing goes on any more.
    pub fn leftovers(&self) -> Vec<String> {
        let pool = self.store.pool.stats();
        let counts = [
            ("blocks in use", pool.used),
            ("claims", pool.pending),
            ("hand-offs", self.receive.receiver.in_flight()),
            ("transfers", self.prefill.sender.in_flight()),
            ("promised blocks", self.prefill.sender.promised()),
            ("sequences", self.receive.sequences.len()),
            ("prefills", self.prefill.works.len()),
            ("open streams", self.streams.open_streams()),
        ];
        let left = counts.into_iter().filter(|(_, n)| *n > 0);
        left.map(|(what, n)| format!("node {}: {n} {what} are left", self.me)).collect()
    }

    pub(super) fn sabotaged(&self, sabotage: Sabotage) -> bool {
        self.setup.sabotage == Some(sabotage)
    }

    pub(super) fn tell_receiver(&mut self, input: ReceiverInput) {
        self.inputs.push_back(MachineInput::Receiver(input));
    }

    pub(super) fn tell_sender(&mut self, input: SenderInput) {
        self.inputs.push_back(MachineInput::Sender(input));
    }

    /// Hands over an answer of the pool's owner, which has another thread: a little later, in order.
    pub(super) fn answer(&mut self, input: MachineInput) {
        let late = Duration::from_nanos(self.random.below(600_000) as u64);
        self.told_at = self.told_at.max(self.now + late);
        self.made += 1;
        self.jobs.insert((self.told_at, self.made), Job::Tell(input));
    }

    /// Does it after about `millis`, sometimes much later while there is trouble.
    pub(super) fn after(&mut self, millis: f64, job: Job) {
        let hiccups = self.setup.trouble.get() > 0.0 && self.random.below(200) == 0;
        let factor = if hiccups { self.random.unit() * 400.0 } else { 0.5 + self.random.unit() };
        let nanos = (millis * factor * 1e6).min(HICCUP_NANOS_MAX) as u64 + 1;
        let at = self.now + Duration::from_nanos(nanos);
        self.made += 1;
        self.jobs.insert((at, self.made), job);
    }

    /// Runs until nothing is left to do at this moment.
    fn settle(&mut self) {
        loop {
            if let Some(input) = self.inputs.pop_front() {
                self.run_machine(input);
            } else if let Some(event) = self.streams.events.pop_front() {
                match event {
                    StreamEvent::Readable { stream, peer } => {
                        self.readable.push_back((stream, peer));
                    }
                    StreamEvent::Broken { stream } => self.on_broken(stream),
                }
            } else if let Some((stream, peer)) = self.readable.pop_front() {
                self.on_readable(stream, peer);
            } else if let Some(command) = self.commands.pop_front() {
                self.on_command(command);
            } else {
                break;
            }
        }
    }

    fn run_machine(&mut self, input: MachineInput) {
        match input {
            MachineInput::Receiver(input) => {
                let mut outputs = Vec::new();
                self.receive.receiver.handle(self.now, input, &mut outputs);
                outputs.into_iter().for_each(|output| self.do_receiver(output));
            }
            MachineInput::Sender(input) => {
                let mut outputs = Vec::new();
                self.prefill.sender.handle(self.now, input, &mut outputs);
                outputs.into_iter().for_each(|output| self.do_sender(output));
            }
        }
    }

    /// One item of one stream.
    fn on_readable(&mut self, stream: StreamRef, peer: NodeIndex) {
        let one_way = stream.number & 2 != 0;
        if one_way && self.leaves_unread(stream) {
            return self.after(200.0, Job::Read { stream, peer });
        }
        if one_way {
            return self.read_data(stream, peer);
        }
        let Some(item) = self.streams.read(stream, &mut self.out) else { return };
        self.readable.push_back((stream, peer));
        if let Some(&attempt) = self.receive.attempts.get(&stream) {
            self.tell_receiver(match item {
                Item::Message(bytes) => ReceiverInput::Control { attempt, frame: frame_of(bytes) },
                Item::End => ReceiverInput::ControlClosed { attempt },
            });
        } else if let Some(&transfer) = self.prefill.controls.get(&stream) {
            self.tell_sender(match item {
                Item::Message(bytes) => SenderInput::Control { transfer, frame: frame_of(bytes) },
                Item::End => SenderInput::ControlClosed { transfer, finished: true },
            });
        } else if self.controls_seen.insert(stream)
            && let Item::Message(bytes) = item
        {
            let frame = frame_of(bytes);
            let asked = KvAsk::from_frame(&frame).map_or(0, |ask| ask.deadline_ms);
            let deadline = self.now + Duration::from_millis(asked.into());
            let transfer = self.prefill.begin(stream, deadline);
            self.tell_sender(SenderInput::Asked { transfer, peer: node_id(peer), frame });
        }
    }

    /// Whether the thread for a new data stream is late, while there is trouble.
    fn leaves_unread(&mut self, stream: StreamRef) -> bool {
        let new = !self.receive.knows(stream) && self.setup.trouble.get() > 0.0;
        new && !self.late.contains(&stream)
            && self.random.below(20) == 0
            && self.late.insert(stream)
    }

    fn on_broken(&mut self, stream: StreamRef) {
        if let Some(&attempt) = self.receive.attempts.get(&stream) {
            self.tell_receiver(ReceiverInput::ControlClosed { attempt });
        } else if let Some(&transfer) = self.prefill.controls.get(&stream) {
            self.tell_sender(SenderInput::ControlClosed { transfer, finished: false });
        } else if let Some(&transfer) = self.prefill.data.get(&stream) {
            self.tell_sender(SenderInput::DataClosed { transfer });
        } else {
            self.data_broken(stream);
        }
    }

    fn on_command(&mut self, command: Command) {
        match command {
            Command::Generate { request, prompt, sources, wait, greedy } => {
                self.generate(request, prompt, &sources, (wait, greedy));
            }
            Command::Cancel { request } => self.cancel(request),
        }
    }

    fn on_timer(&mut self) {
        self.streams.on_timer(self.now, &mut self.out);
        self.settle();
        while let Some(entry) = self.jobs.first_entry() {
            if entry.key().0 > self.now {
                break;
            }
            let job = entry.remove();
            self.do_job(job);
            self.settle();
        }
        if !self.sabotaged(Sabotage::DeafToTimers) {
            self.tell_receiver(ReceiverInput::Timer);
            self.tell_sender(SenderInput::Timer);
            self.settle();
        }
        let waits = [self.receive.receiver.next_deadline(), self.prefill.sender.next_deadline()];
        let late = waits.into_iter().flatten().any(|due| due <= self.now);
        if late || self.overdue_handoffs() + self.overdue_transfers() > 0 {
            self.ledger.broken(self.me, format_args!("a machine waits past its deadline"));
        }
    }

    fn do_job(&mut self, job: Job) {
        match job {
            Job::Reserve { request, blocks } => self.reserve(request, blocks),
            Job::WriteEnd { stream, block, payload } => self.write_ended(stream, block, payload),
            Job::Fill { request } => self.filled(request),
            Job::Retry { request } => self.fill_rest(request),
            Job::Decode { request } => self.decode(request),
            Job::Serve { transfer } => self.serve(transfer),
            Job::Step { transfer } => self.prefill_step(transfer),
            Job::ReadEnd { transfer, block } => self.read_ended(transfer, block),
            Job::SendRetry { transfer } => self.send_next(transfer),
            Job::Tell(input) => self.inputs.push_back(input),
            Job::Read { stream, peer } => self.read_data(stream, peer),
        }
    }
}

impl Actor for KvNode {
    fn handle(&mut self, now: Instant, stimulus: Stimulus, effects: &mut Vec<Effect>) {
        self.now = now;
        match stimulus {
            Stimulus::Start { .. } => {}
            Stimulus::Datagram { from, bytes } => {
                self.streams.on_datagram(now, from, &bytes, &mut self.out);
            }
            Stimulus::Timer => self.on_timer(),
            Stimulus::Leave => self.tell_sender(SenderInput::Leave),
        }
        self.settle();
        effects.append(&mut self.out);
    }

    fn next_deadline(&self) -> Option<Instant> {
        if !self.commands.is_empty() {
            return Some(self.now);
        }
        let deaf = self.sabotaged(Sabotage::DeafToTimers);
        let machines = [self.receive.receiver.next_deadline(), self.prefill.sender.next_deadline()];
        // A deaf shell would be woken for ever.
        let machines = machines.into_iter().flatten().filter(|due| !deaf || *due > self.now);
        let job = self.jobs.first_key_value().map(|((at, _), _)| *at);
        machines.chain(job).chain(self.streams.next_deadline()).min()
    }

    fn present(&self) -> Vec<NodeIndex> {
        Vec::new()
    }

    fn view_hash(&self) -> u64 {
        0
    }

    fn broken_bound(&self) -> Option<String> {
        let receiving = self.receive.receiver.in_flight();
        let sending = self.prefill.sender.in_flight();
        let promised = self.prefill.sender.promised();
        if receiving > self.transfers_max || sending > self.transfers_max {
            return Some(format!("{receiving} hand-offs and {sending} transfers"));
        }
        (promised > self.setup.capacity as usize).then(|| format!("{promised} blocks promised"))
    }
}

pub(super) fn node_id(node: NodeIndex) -> NodeId {
    let mut id = [0; 32];
    id[..4].copy_from_slice(&node.to_le_bytes());
    NodeId(id)
}

pub(super) fn node_index(id: NodeId) -> NodeIndex {
    NodeIndex::from_le_bytes(*id.0.first_chunk().expect("32 bytes"))
}

pub(super) fn frame_of(bytes: Vec<u8>) -> Frame {
    Frame::decode(&bytes, KV_FRAME_BYTES_MAX).expect("peers send frames")
}

/// Longer than every wait of a receiver for its peer.
const HICCUP_NANOS_MAX: f64 = 3e9;
