//! The decoding side's shell: streams into pages, pages into the pool, sequences that decode.

use std::collections::BTreeMap;

use bincode::{Decode, Encode};
use cache::transfer::{
    AttemptId, BlockDigest, HandOff, HandOffOutcome, Receiver, ReceiverInput, ReceiverOutput,
    Source, StreamId,
};
use cache::{BlockHash, BlockId, Committed};
use protocol::frame::{Frame, Kind};
use protocol::transfer::{self, KvCommit, KvFirstToken, KvStream};
use protocol::{Duration, Instant, RequestId, SequenceId, TenantId, TokenId, wire};

use super::ledger::Fate;
use super::model::{Content, Prompt, digest};
use super::node::{Job, KvNode, MachineInput, Sabotage, frame_of, node_id, node_index};
use crate::actor::NodeIndex;
use crate::streams::{Item, StreamEvent, StreamRef};

pub(super) struct Receive {
    pub receiver: Receiver,
    pub sequences: BTreeMap<RequestId, Sequence>,
    /// Control streams of attempts that are not closed.
    pub attempts: BTreeMap<StreamRef, AttemptId>,
    controls: BTreeMap<AttemptId, (StreamRef, RequestId)>,
    data: BTreeMap<StreamRef, Data>,
    ids: BTreeMap<StreamId, StreamRef>,
    streams_made: u64,
}

/// A request that runs here.
pub(super) struct Sequence {
    prompt: Prompt,
    names: Vec<BlockHash>,
    /// The blocks of its beginning, each with a reference.
    held: Vec<BlockId>,
    /// Being prefilled here.
    filling: Vec<BlockId>,
    in_handoff: bool,
    fetched: usize,
    prefilled: usize,
    /// Of the hand-off, then of the request.
    deadline: Instant,
    gives_up: Instant,
    answer: Vec<TokenId>,
    generated: Vec<TokenId>,
}

/// A data stream from a peer.
struct Data {
    id: StreamId,
    peer: NodeIndex,
    write: Option<Write>,
    /// The digests of the last `Write`.
    written: Vec<BlockDigest>,
}

struct Write {
    blocks: Vec<BlockId>,
    names: Vec<BlockHash>,
    digests: Vec<BlockDigest>,
    /// A page is being written at this moment.
    in_page: bool,
    /// Nothing further shall be written, and the stream is closed if so.
    stop: Option<Stopped>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stopped {
    ByMachine,
    ByPeer,
}

/// One block's payload on the wire, with what only the oracles look at.
#[derive(Clone, Debug, Encode, Decode)]
pub(super) struct Payload {
    pub bytes: Content,
    pub tenant: String,
    pub attempt: u64,
}

impl Receive {
    pub fn new(receiver: Receiver) -> Self {
        Receive {
            receiver,
            sequences: BTreeMap::new(),
            attempts: BTreeMap::new(),
            controls: BTreeMap::new(),
            data: BTreeMap::new(),
            ids: BTreeMap::new(),
            streams_made: 0,
        }
    }

    /// Whether anything of that data stream was read.
    pub fn knows(&self, stream: StreamRef) -> bool {
        self.data.contains_key(&stream)
    }
}

impl KvNode {
    pub(super) fn generate(
        &mut self,
        request: RequestId,
        prompt: Prompt,
        sources: &[(NodeIndex, bool)],
        (wait, greedy): (Duration, bool),
    ) {
        self.ledger.begin(request, self.me);
        let model = self.setup.model;
        let names = model.names(&prompt, !self.sabotaged(Sabotage::SkipTenant));
        let held = self.store.pool.match_prefix(&names);
        let (first, missing) = (held.len() as u32, names[held.len()..].to_vec());
        let remote = !missing.is_empty() && !sources.is_empty();
        let sequence = Sequence {
            answer: model.answer(&prompt, ANSWER_TOKENS),
            prompt: prompt.clone(),
            names,
            held,
            filling: Vec::new(),
            in_handoff: remote,
            fetched: 0,
            prefilled: 0,
            deadline: self.now + wait,
            gives_up: self.now + wait + PATIENCE,
            generated: Vec::new(),
        };
        self.receive.sequences.insert(request, sequence);
        if !remote {
            return self.fill_rest(request);
        }
        let source = |&(peer, prefill): &_| Source { peer: node_id(peer), prefill, streams: 1 };
        let first_token = if greedy { KvFirstToken::Greedy } else { KvFirstToken::Receiver };
        self.tell_receiver(ReceiverInput::Start(HandOff {
            request,
            first,
            missing,
            prompt: cache::transfer::Prompt {
                tenant: prompt.tenant,
                tokens: prompt.tokens,
                priority: 0,
                first_token,
            },
            sources: sources.iter().map(source).collect(),
            deadline: self.now + wait,
        }));
    }

    pub(super) fn cancel(&mut self, request: RequestId) {
        let Some(sequence) = self.receive.sequences.remove(&request) else { return };
        if sequence.in_handoff {
            self.tell_receiver(ReceiverInput::Cancel { request });
        }
        self.store.release(sequence.held.into_iter().chain(sequence.filling));
        self.ledger.end(request, Fate::Cancelled);
    }

    pub(super) fn do_receiver(&mut self, output: ReceiverOutput) {
        match output {
            ReceiverOutput::Reserve { request, blocks } => {
                self.after(0.3, Job::Reserve { request, blocks });
            }
            ReceiverOutput::Ask { attempt, peer, frame } => {
                let stream = self.streams.open(self.now, node_index(peer));
                self.controls_seen.insert(stream);
                self.receive.attempts.insert(stream, attempt);
                let request = transfer::KvAsk::from_frame(&frame).expect("its own").request();
                self.receive.controls.insert(attempt, (stream, request));
                let resumes = self.receive.sequences.get(&request).is_some_and(|s| s.fetched > 0);
                self.ledger.count(|counts| {
                    counts.attempts += 1;
                    counts.resumed += u64::from(resumes);
                });
                self.streams.write(self.now, stream, frame.encode(), &mut self.out);
            }
            ReceiverOutput::Write { stream, blocks, names } => {
                let stream = self.receive.ids[&stream];
                let data = self.receive.data.get_mut(&stream).expect("it reads this stream");
                let (digests, in_page, stop) = (Vec::new(), false, None);
                data.write = Some(Write { blocks, names, digests, in_page, stop });
                let peer = data.peer;
                self.read_data(stream, peer);
            }
            ReceiverOutput::Stop { stream } => self.stop_data(stream),
            ReceiverOutput::Attach { request, blocks } => self.attach(request, blocks),
            ReceiverOutput::Free { blocks } => {
                if !self.sabotaged(Sabotage::NeverFree) {
                    self.store.release(blocks.into_iter());
                }
            }
            ReceiverOutput::Close { attempt, done } => {
                let Some((stream, _)) = self.receive.controls.remove(&attempt) else { return };
                self.receive.attempts.remove(&stream);
                match done {
                    true => self.streams.finish(self.now, stream, &mut self.out),
                    false => self.streams.reset(self.now, stream, &mut self.out),
                }
            }
            ReceiverOutput::Attempted { error, .. } => {
                let text = format!("{error:?}");
                let word = text.split([' ', '{']).next().unwrap_or_default().to_owned();
                self.ledger.count(|counts| *counts.failed.entry(word).or_default() += 1);
            }
            ReceiverOutput::Ended { request, verified, outcome } => {
                self.handoff_ended(request, verified, &outcome);
            }
        }
    }

    /// Requests whose hand-off goes on after its time.
    pub(super) fn overdue_handoffs(&self) -> usize {
        let sequences = self.receive.sequences.values();
        sequences.filter(|s| s.in_handoff && s.deadline <= self.now).count()
    }

    /// The pool's owner answers.
    pub(super) fn reserve(&mut self, request: RequestId, blocks: usize) {
        let reserved = self.store.pool.reserve(blocks, &mut Vec::new());
        let blocks = reserved.unwrap_or_default();
        let reserved = ReceiverInput::Reserved { request, blocks };
        self.answer(MachineInput::Receiver(reserved));
    }

    /// One item of a data stream: a frame, or a payload if a `Write` wants it.
    pub(super) fn read_data(&mut self, stream: StreamRef, peer: NodeIndex) {
        let write = self.receive.data.get(&stream).and_then(|data| data.write.as_ref());
        let writing = write.is_some();
        if write.is_some_and(|write| write.in_page) {
            return;
        }
        let Some(item) = self.streams.read(stream, &mut self.out) else { return };
        match item {
            Item::End => self.data_broken(stream),
            Item::Message(bytes) if writing => self.begin_write(stream, &bytes),
            Item::Message(bytes) => {
                let frame = self.as_told(stream, peer, frame_of(bytes));
                let id = self.receive.data[&stream].id;
                self.tell_receiver(ReceiverInput::Data { stream: id, peer: node_id(peer), frame });
                // What comes next depends on what the machine says to this.
                self.streams.events.push_back(StreamEvent::Readable { stream, peer });
            }
        }
    }

    /// The frame, unless the shell is sabotaged.
    fn as_told(&mut self, stream: StreamRef, peer: NodeIndex, frame: Frame) -> Frame {
        let Some(data) = self.receive.data.get(&stream) else {
            self.receive.streams_made += 1;
            let id = StreamId(self.receive.streams_made);
            self.receive.ids.insert(id, stream);
            let data = Data { id, peer, write: None, written: Vec::new() };
            self.receive.data.insert(stream, data);
            return self.header_as_told(frame);
        };
        if frame.kind == Kind::KV_COMMIT && self.sabotaged(Sabotage::AttachUnverified) {
            let mut commit = KvCommit::from_frame(&frame).expect("peers send sound frames");
            if commit.digests.len() == data.written.len() {
                commit.digests = data.written.iter().map(|digest| digest.0).collect();
            }
            return Frame::new(Kind::KV_COMMIT, &commit);
        }
        frame
    }

    fn header_as_told(&self, frame: Frame) -> Frame {
        if self.sabotaged(Sabotage::IgnoreAttempt)
            && let Ok(mut header) = transfer::value::<KvStream>(&frame, Kind::KV_STREAM)
            && let Some((attempt, _)) =
                self.receive.controls.iter().find(|(_, (_, r))| r.0 == header.request)
        {
            header.attempt = attempt.0;
            return Frame::new(Kind::KV_STREAM, &header);
        }
        frame
    }

    fn begin_write(&mut self, stream: StreamRef, bytes: &[u8]) {
        let payload: Payload = wire::decode::<_, 4096>(bytes).expect("peers send payloads");
        if !self.receive.controls.contains_key(&AttemptId(payload.attempt)) {
            self.ledger.broken(self.me, format_args!("bytes of a past attempt are written"));
        }
        let data = self.receive.data.get_mut(&stream).expect("it reads this stream");
        let write = data.write.as_mut().expect("it is under way");
        write.in_page = true;
        let (id, block) = (data.id, write.blocks[write.digests.len()]);
        self.store.begin_write(block);
        self.after(0.4, Job::WriteEnd { stream: id, block, payload });
    }

    pub(super) fn write_ended(&mut self, id: StreamId, block: BlockId, payload: Payload) {
        let tenant = TenantId::new(&payload.tenant).expect("peers name tenants");
        self.store.end_write(block, payload.bytes, tenant);
        let Some(&stream) = self.receive.ids.get(&id) else { return };
        let data = self.receive.data.get_mut(&stream).expect("known by its number");
        let Some(write) = &mut data.write else { return };
        write.in_page = false;
        let name = write.names[write.digests.len()];
        write.digests.push(digest(&name, &payload.bytes));
        if write.stop.is_some() {
            return self.write_stopped(stream);
        }
        let peer = data.peer;
        if write.digests.len() < write.blocks.len() {
            return self.read_data(stream, peer);
        }
        let write = data.write.take().expect("it was just there");
        data.written = write.digests.clone();
        self.tell_receiver(ReceiverInput::Written { stream: id, digests: write.digests });
        if self.sabotaged(Sabotage::ReadBeforeCommit) {
            let (_, request) = self.receive.controls[&AttemptId(payload.attempt)];
            if let Some(sequence) = self.receive.sequences.get(&request) {
                self.store.read(block, &name, &sequence.prompt.tenant);
            }
        }
        self.streams.events.push_back(StreamEvent::Readable { stream, peer });
    }

    /// The machine wants no more of it.
    fn stop_data(&mut self, id: StreamId) {
        let Some(&stream) = self.receive.ids.get(&id) else { return };
        self.ledger.count(|counts| counts.stopped_streams += 1);
        self.streams.reset(self.now, stream, &mut self.out);
        self.end_data(stream, Stopped::ByMachine);
    }

    /// The peer reset it, ended it, or the connection is gone.
    pub(super) fn data_broken(&mut self, stream: StreamRef) {
        self.end_data(stream, Stopped::ByPeer);
    }

    fn end_data(&mut self, stream: StreamRef, how: Stopped) {
        let outlives = self.sabotaged(Sabotage::WriterOutlivesStop);
        let Some(data) = self.receive.data.get_mut(&stream) else { return };
        let Some(write) = &mut data.write else {
            let data = self.receive.data.remove(&stream).expect("it was just there");
            self.receive.ids.remove(&data.id);
            if how == Stopped::ByPeer {
                self.tell_receiver(ReceiverInput::DataClosed { stream: data.id });
            }
            return;
        };
        write.stop = Some(write.stop.unwrap_or(how));
        if !write.in_page || outlives {
            self.write_stopped(stream);
        }
    }

    fn write_stopped(&mut self, stream: StreamRef) {
        let data = self.receive.data.remove(&stream).expect("its writer has stopped");
        self.receive.ids.remove(&data.id);
        self.tell_receiver(ReceiverInput::WriteStopped { stream: data.id });
        if data.write.is_some_and(|write| write.stop == Some(Stopped::ByPeer)) {
            self.tell_receiver(ReceiverInput::DataClosed { stream: data.id });
        }
    }

    fn attach(&mut self, request: RequestId, blocks: Vec<(BlockId, BlockHash)>) {
        let Some(sequence) = self.receive.sequences.get_mut(&request) else {
            return self.ledger.broken(self.me, format_args!("attached to a request that is gone"));
        };
        self.ledger.count(|counts| counts.fetched += blocks.len() as u64);
        for (block, name) in blocks {
            self.store.check_tenant(block, &sequence.prompt.tenant);
            if sequence.names.get(sequence.held.len()) != Some(&name) {
                self.ledger.broken(self.me, format_args!("{request} got a block out of order"));
            }
            sequence.fetched += 1;
            sequence.held.push(match self.store.pool.attach(block, name) {
                Committed::Indexed => block,
                Committed::Replaced(canonical) => canonical,
            });
        }
    }

    fn handoff_ended(&mut self, request: RequestId, verified: usize, outcome: &HandOffOutcome) {
        let text = format!("{outcome:?}");
        let word = text.split([' ', '{', '(']).next().unwrap_or_default().to_owned();
        self.ledger.count(|counts| *counts.handoffs.entry(word).or_default() += 1);
        let Some(sequence) = self.receive.sequences.get_mut(&request) else { return };
        sequence.in_handoff = false;
        let complete = sequence.held.len() == sequence.names.len();
        if sequence.fetched != verified {
            self.ledger.broken(self.me, format_args!("{request}: {verified} were not attached"));
        }
        if let HandOffOutcome::Complete { first_token, .. } = *outcome
            && (first_token.is_some_and(|token| token != sequence.answer[0]) || !complete)
        {
            self.ledger.broken(self.me, format_args!("{request}: a wrong first token"));
        }
        self.fill_rest(request);
    }

    /// Prefills here what no peer has sent; then decodes.
    pub(super) fn fill_rest(&mut self, request: RequestId) {
        let Some(sequence) = self.receive.sequences.get_mut(&request) else { return };
        let rest = &sequence.names[sequence.held.len()..];
        let found = self.store.pool.match_prefix(rest);
        sequence.held.extend(found);
        let missing = sequence.names.len() - sequence.held.len();
        if missing == 0 {
            return self.after(1.0, Job::Decode { request });
        }
        match self.store.pool.reserve(missing, &mut Vec::new()) {
            Some(blocks) => {
                sequence.filling = blocks;
                self.after(0.5 * missing as f64, Job::Fill { request });
            }
            None => {
                // Who waits holds nothing, or two could wait for each other.
                let held = std::mem::take(&mut sequence.held);
                let over = self.now >= sequence.gives_up;
                self.store.release(held.into_iter());
                if over {
                    self.receive.sequences.remove(&request);
                    return self.ledger.end(request, Fate::NoRoom);
                }
                self.after(5.0, Job::Retry { request });
            }
        }
    }

    pub(super) fn filled(&mut self, request: RequestId) {
        let Some(sequence) = self.receive.sequences.get_mut(&request) else { return };
        let contents = self.setup.model.contents(&sequence.prompt);
        for block in std::mem::take(&mut sequence.filling) {
            let at = sequence.held.len();
            self.store.fill(block, contents[at], &sequence.prompt.tenant);
            let owner = SequenceId(request.0 as u64);
            let committed = self.store.pool.commit(block, sequence.names[at], owner);
            sequence.prefilled += 1;
            sequence.held.push(match committed {
                Committed::Indexed => block,
                Committed::Replaced(canonical) => canonical,
            });
        }
        self.after(1.0, Job::Decode { request });
    }

    pub(super) fn decode(&mut self, request: RequestId) {
        let Some(sequence) = self.receive.sequences.get_mut(&request) else { return };
        let tenant = &sequence.prompt.tenant;
        let pages = sequence.held.iter().zip(&sequence.names);
        let pages: Vec<Content> =
            pages.map(|(block, name)| self.store.read(*block, name, tenant)).collect();
        let token = self.setup.model.next(&sequence.prompt, &pages, &sequence.generated);
        let right = sequence.answer[sequence.generated.len()];
        if token != right {
            self.ledger.broken(self.me, format_args!("{request} got a wrong token"));
        }
        sequence.generated.push(token);
        if sequence.generated.len() < ANSWER_TOKENS {
            return self.after(1.0, Job::Decode { request });
        }
        let sequence = self.receive.sequences.remove(&request).expect("it was just there");
        if !self.sabotaged(Sabotage::KeepBlocks) {
            self.store.release(sequence.held.into_iter());
        }
        let Sequence { fetched, prefilled, .. } = sequence;
        self.ledger.end(request, Fate::Right { fetched, prefilled });
    }
}

const ANSWER_TOKENS: usize = 3;
/// How much longer than its hand-off may take a request waits for room.
const PATIENCE: Duration = Duration::from_secs(4);
