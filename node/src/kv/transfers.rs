//! The task of a model's transfers: it runs both machines of [`cache::transfer`], and does what they say.
//!
//! It waits for nobody: streams and the replica have tasks and a thread of their own and answer with inputs.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant as Moment;

use bytes::Bytes;
use cache::transfer::{
    AttemptId, BlockDigest, HandOff, HandOffOutcome, Receiver, ReceiverInput, ReceiverOutput,
    Sender, SenderInput, SenderOutput, StreamId, TransferConfig, TransferId,
};
use cache::{BlockHash, BlockId};
use protocol::frame::{Frame, Kind};
use protocol::transfer::{KV_STREAMS_MAX, KvPart, KvStream};
use protocol::{Duration, Instant, Machine, NodeId, RequestId};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::counters::Counters;
use super::directory::{Directory, pool_part};
use super::pool::{PoolCommand, PoolEvent};
use super::streams::{self, DataOrder, SendOrder};
use super::stripes::StripedReader;
use crate::mesh::{DataStream, FrameStream, Roster};
use crate::replica::ReplicaHandle;

/// What the task is told.
pub(super) enum Input {
    HandOff { handoff: HandOff, deadline: Moment, ended: oneshot::Sender<Ended> },
    Cancel { request: RequestId },
    Control { attempt: AttemptId, frame: Frame },
    ControlClosed { attempt: AttemptId },
    DataOpened { peer: NodeId, header: KvStream, data: DataStream },
    PartOpened { peer: NodeId, part: KvPart, data: DataStream },
    Data { stream: StreamId, frame: Frame },
    Payloads { stream: StreamId, payloads: Vec<Vec<Bytes>> },
    PayloadsLost { stream: StreamId },
    DataClosed { stream: StreamId },
    Asked { peer: NodeId, ask: Frame, stream: FrameStream },
    ServedControl { transfer: TransferId, frame: Frame },
    ServedClosed { transfer: TransferId, finished: bool },
    Sent { transfer: TransferId, digests: Vec<BlockDigest> },
    SendStopped { transfer: TransferId },
    SendClosed { transfer: TransferId },
    Leave,
}

/// How a hand-off ended.
#[derive(Clone, Debug)]
pub(crate) struct Ended {
    /// Of the missing blocks, from the first on, those that are here now.
    pub verified: usize,
    pub outcome: HandOffOutcome,
    pub took: Duration,
    /// No source failed: all came from the first.
    pub from_first: bool,
}

/// See the module.
pub(super) struct Transfers {
    origin: Moment,
    receiver: Receiver,
    sender: Sender,
    replica: ReplicaHandle,
    roster: Arc<Roster>,
    counters: Arc<Counters>,
    directory: Arc<Directory>,
    identity: [u8; 32],
    block_bytes: usize,
    inputs: mpsc::Sender<Input>,
    next_stream: u64,
    next_transfer: u64,
    /// Hand-offs that somebody waits for.
    waiting: BTreeMap<RequestId, Waiting>,
    asks: BTreeMap<AttemptId, Asked>,
    data: BTreeMap<StreamId, Incoming>,
    served: BTreeMap<TransferId, Outgoing>,
}

struct Waiting {
    since: Moment,
    from_first: bool,
    ended: oneshot::Sender<Ended>,
}

/// An attempt of a hand-off.
struct Asked {
    peer: NodeId,
    close: oneshot::Sender<bool>,
    /// Its further data streams, on their way to the task of the first; at most `KV_STREAMS_MAX` wait,
    /// more are stopped.
    parts: mpsc::Sender<(KvPart, DataStream)>,
    /// Until there is a first.
    parted: Option<mpsc::Receiver<(KvPart, DataStream)>>,
}

/// A data stream of a peer.
struct Incoming {
    peer: NodeId,
    orders: mpsc::UnboundedSender<DataOrder>,
    /// Where the payloads under way go.
    write: Option<(Vec<BlockId>, Vec<BlockHash>)>,
}

/// A transfer to a peer.
struct Outgoing {
    /// Ends the control stream when it is dropped.
    control: Option<mpsc::UnboundedSender<Frame>>,
    data: Option<mpsc::UnboundedSender<SendOrder>>,
    /// The chunk whose pages the replica copies now.
    chunk: Option<(Frame, Vec<BlockHash>)>,
    closed: CancellationToken,
}

impl Transfers {
    /// `first_attempt` is a number from which on no other task of this process counts.
    pub fn new(
        config: TransferConfig,
        first_attempt: u64,
        replica: ReplicaHandle,
        roster: Arc<Roster>,
        (counters, directory, inputs): (Arc<Counters>, Arc<Directory>, mpsc::Sender<Input>),
    ) -> Self {
        Transfers {
            origin: Moment::now(),
            identity: config.format.identity,
            block_bytes: config.format.block_bytes as usize,
            receiver: Receiver::counting_from(config.clone(), first_attempt),
            sender: Sender::new(config),
            replica,
            roster,
            counters,
            directory,
            inputs,
            next_stream: 0,
            next_transfer: 0,
            waiting: BTreeMap::new(),
            asks: BTreeMap::new(),
            data: BTreeMap::new(),
            served: BTreeMap::new(),
        }
    }

    /// Runs until the replica ends or the node stops.
    pub async fn run(mut self, mut inputs: mpsc::Receiver<Input>, stop: CancellationToken) {
        let mut pool = self.replica.pool_events();
        self.replica.pool(PoolCommand::Watch);
        loop {
            let next = [self.receiver.next_deadline(), self.sender.next_deadline()];
            let timer = async {
                match next.into_iter().flatten().min() {
                    Some(at) => {
                        let after = std::time::Duration::from_nanos(at.as_nanos());
                        tokio::time::sleep_until((self.origin + after).into()).await;
                    }
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                () = timer => {
                    self.receive(ReceiverInput::Timer);
                    self.send(SenderInput::Timer);
                }
                event = pool.recv() => match event {
                    Some(event) => self.on_pool(event),
                    None => return,
                },
                input = inputs.recv() => match input {
                    Some(input) => self.on_input(input),
                    None => return,
                },
            }
        }
    }

    fn now(&self) -> Instant {
        Instant::ORIGIN + self.origin.elapsed()
    }

    fn on_input(&mut self, input: Input) {
        match input {
            Input::HandOff { mut handoff, deadline, ended } => {
                let left = deadline.saturating_duration_since(Moment::now());
                handoff.deadline = self.now() + Duration::from_nanos(left.as_nanos() as u64);
                let (request, names) = (handoff.request, handoff.missing.clone());
                self.waiting
                    .insert(request, Waiting { since: Moment::now(), from_first: true, ended });
                self.replica.pool(PoolCommand::Begin { request, names });
                self.receive(ReceiverInput::Start(handoff));
            }
            Input::Cancel { request } => {
                self.receive(ReceiverInput::Cancel { request });
                self.replica.pool(PoolCommand::End { request });
            }
            Input::Control { attempt, frame } => {
                self.receive(ReceiverInput::Control { attempt, frame });
            }
            Input::ControlClosed { attempt } => {
                self.receive(ReceiverInput::ControlClosed { attempt });
            }
            Input::DataOpened { peer, header, data } => self.on_data_opened(peer, header, data),
            Input::PartOpened { peer, part, data } => self.on_part_opened(peer, part, data),
            Input::Data { stream, frame } => {
                if let Some(Incoming { peer, .. }) = self.data.get(&stream) {
                    let peer = *peer;
                    self.receive(ReceiverInput::Data { stream, peer, frame });
                }
            }
            Input::Payloads { stream, payloads } => self.on_payloads(stream, payloads),
            Input::PayloadsLost { stream } => {
                self.receive(ReceiverInput::WriteStopped { stream });
            }
            Input::DataClosed { stream } => {
                self.receive(ReceiverInput::DataClosed { stream });
                self.data.remove(&stream);
            }
            Input::Asked { peer, ask, stream } => self.on_asked(peer, ask, stream),
            Input::ServedControl { transfer, frame } => {
                self.send(SenderInput::Control { transfer, frame });
            }
            Input::ServedClosed { transfer, finished } => {
                self.send(SenderInput::ControlClosed { transfer, finished });
            }
            Input::Sent { transfer, digests } => {
                self.counters.sent(digests.len() * self.block_bytes);
                self.send(SenderInput::Sent { transfer, digests });
            }
            Input::SendStopped { transfer } => self.send(SenderInput::SendStopped { transfer }),
            Input::SendClosed { transfer } => self.send(SenderInput::DataClosed { transfer }),
            Input::Leave => self.send(SenderInput::Leave),
        }
    }

    fn on_pool(&mut self, event: PoolEvent) {
        match event {
            PoolEvent::Reserved { request, blocks } => {
                self.receive(ReceiverInput::Reserved { request, blocks });
            }
            PoolEvent::Written { stream, digests: Some(digests) } => {
                self.counters.received(digests.len() * self.block_bytes);
                self.receive(ReceiverInput::Written { stream, digests });
                if let Some(incoming) = self.data.get(&stream) {
                    // The task has ended if the stream is stopped.
                    let _ = incoming.orders.send(DataOrder::Go);
                }
            }
            PoolEvent::Written { stream, digests: None } => {
                tracing::error!("payloads of a peer do not fit their pages");
                self.receive(ReceiverInput::WriteStopped { stream });
            }
            PoolEvent::Ready { transfer, blocks } => {
                self.send(SenderInput::Ready { transfer, blocks });
            }
            PoolEvent::Finished { transfer, cached } => {
                let cached = u32::try_from(cached).unwrap_or(u32::MAX);
                self.send(SenderInput::Finished { transfer, first_token: None, cached });
            }
            PoolEvent::Declined { transfer, refusal } => {
                self.send(SenderInput::Declined { transfer, refusal });
            }
            PoolEvent::Read { transfer, payloads } => self.on_read(transfer, payloads),
            PoolEvent::Named { anywhere, in_pool } => {
                self.directory.changed(self.identity, &anywhere);
                self.directory.changed(pool_part(self.identity), &in_pool);
            }
        }
    }

    fn on_data_opened(&mut self, peer: NodeId, header: KvStream, data: DataStream) {
        let stream = StreamId(self.next_stream);
        self.next_stream += 1;
        let (orders, ordered) = mpsc::unbounded_channel();
        self.data.insert(stream, Incoming { peer, orders, write: None });
        // Adopted or stopped.
        let frame = Frame::new(Kind::KV_STREAM, &header);
        self.receive(ReceiverInput::Data { stream, peer, frame });
        let adopted = self.data.contains_key(&stream);
        let asked = self.asks.get_mut(&AttemptId(header.attempt)).filter(|_| adopted);
        let parted = asked.and_then(|asked| asked.parted.take());
        let known = (stream, self.block_bytes);
        let data = StripedReader::new(data, header, parted);
        tokio::spawn(streams::receive(known, data, ordered, self.inputs.clone()));
    }

    fn on_part_opened(&mut self, peer: NodeId, part: KvPart, data: DataStream) {
        let asked = self.asks.get(&AttemptId(part.attempt)).filter(|asked| asked.peer == peer);
        let refused = match asked {
            // It goes with the attempt if nobody takes it.
            Some(asked) => asked.parts.try_send((part, data)).err().map(|full| full.into_inner().1),
            None => Some(data),
        };
        if let Some(mut data) = refused {
            data.reader.stop();
        }
    }

    fn on_payloads(&mut self, stream: StreamId, payloads: Vec<Vec<Bytes>>) {
        let write = self.data.get_mut(&stream).and_then(|incoming| incoming.write.take());
        match write {
            Some((blocks, names)) => {
                self.replica.pool(PoolCommand::Write { stream, blocks, names, payloads });
            }
            None => self.receive(ReceiverInput::WriteStopped { stream }),
        }
    }

    fn on_asked(&mut self, peer: NodeId, ask: Frame, stream: FrameStream) {
        let transfer = TransferId(self.next_transfer);
        self.next_transfer += 1;
        let (control, frames) = mpsc::unbounded_channel();
        let outgoing = Outgoing {
            control: Some(control),
            data: None,
            chunk: None,
            closed: CancellationToken::new(),
        };
        self.served.insert(transfer, outgoing);
        tokio::spawn(streams::serve_control(transfer, stream, frames, self.inputs.clone()));
        self.send(SenderInput::Asked { transfer, peer, frame: ask });
    }

    /// Copies of the pages of a chunk are here: they go to the stream, if it is still wanted.
    fn on_read(&mut self, transfer: TransferId, payloads: Vec<Bytes>) {
        let Some(outgoing) = self.served.get_mut(&transfer) else { return };
        let Some((frame, names)) = outgoing.chunk.take() else { return };
        let order = SendOrder::Chunk { frame, names, payloads };
        let ordered = outgoing.data.as_ref().is_some_and(|data| data.send(order).is_ok());
        if !ordered {
            self.send(SenderInput::SendStopped { transfer });
        }
    }

    fn receive(&mut self, input: ReceiverInput) {
        let mut out = Vec::new();
        self.receiver.handle(self.now(), input, &mut out);
        for output in out {
            self.do_received(output);
        }
    }

    fn do_received(&mut self, output: ReceiverOutput) {
        match output {
            ReceiverOutput::Reserve { request, blocks } => {
                self.replica.pool(PoolCommand::Reserve { request, blocks });
            }
            ReceiverOutput::Ask { attempt, peer, frame } => {
                let (close, closed) = oneshot::channel();
                let (parts, parted) = mpsc::channel(KV_STREAMS_MAX);
                let parted = Some(parted);
                self.asks.insert(attempt, Asked { peer, close, parts, parted });
                let (roster, inputs) = (self.roster.clone(), self.inputs.clone());
                tokio::spawn(streams::ask(roster, (attempt, peer, frame), closed, inputs));
            }
            ReceiverOutput::Write { stream, blocks, names } => {
                if let Some(incoming) = self.data.get_mut(&stream) {
                    incoming.write = Some((blocks, names));
                    let _ = incoming.orders.send(DataOrder::Read);
                }
            }
            ReceiverOutput::Stop { stream } => self.stop(stream),
            ReceiverOutput::Attach { request, blocks } => {
                self.replica.pool(PoolCommand::Attach { request, blocks });
            }
            ReceiverOutput::Free { blocks } => self.replica.pool(PoolCommand::Release { blocks }),
            ReceiverOutput::Close { attempt, done } => {
                if let Some(Asked { close, .. }) = self.asks.remove(&attempt) {
                    // The task has ended where the stream has.
                    let _ = close.send(done);
                }
            }
            ReceiverOutput::Attempted { request, peer, error, .. } => {
                self.counters.attempt_failed(&error);
                if let Some(waiting) = self.waiting.get_mut(&request) {
                    waiting.from_first = false;
                }
                let node = self.roster.name_of(peer);
                tracing::info!(%request, node, %error, "a peer's KV blocks did not come");
            }
            ReceiverOutput::Ended { request, verified, outcome } => {
                let waiting = self.waiting.remove(&request);
                let took = waiting.as_ref().map_or(Duration::ZERO, |w| w.since.elapsed());
                self.counters.ended(&outcome, verified, took);
                tracing::debug!(%request, verified, ?outcome, ?took, "a hand-off has ended");
                match waiting {
                    Some(Waiting { ended, from_first, .. }) if !ended.is_closed() => {
                        let _ = ended.send(Ended { verified, outcome, took, from_first });
                    }
                    // Nobody will submit the request.
                    _ => self.replica.pool(PoolCommand::End { request }),
                }
            }
        }
    }

    /// Stops a stream. Its task answers for payloads that it is reading; those that have not been asked
    /// for yet, or are with the replica, are answered for elsewhere.
    fn stop(&mut self, stream: StreamId) {
        if let Some(incoming) = self.data.remove(&stream) {
            let _ = incoming.orders.send(DataOrder::Stop);
        }
    }

    fn send(&mut self, input: SenderInput) {
        let mut out = Vec::new();
        self.sender.handle(self.now(), input, &mut out);
        for output in out {
            self.do_sent(output);
        }
    }

    fn do_sent(&mut self, output: SenderOutput) {
        match output {
            SenderOutput::Control { transfer, frame } => {
                if let Some(Outgoing { control: Some(control), .. }) = self.served.get(&transfer) {
                    let _ = control.send(frame);
                }
            }
            SenderOutput::Serve { transfer, served } => {
                self.replica.pool(PoolCommand::Serve { transfer, served });
            }
            SenderOutput::Unserve { transfer } => {
                self.replica.pool(PoolCommand::Unserve { transfer });
            }
            SenderOutput::OpenData { transfer, peer, header, streams } => {
                let Some(outgoing) = self.served.get_mut(&transfer) else { return };
                let (orders, ordered) = mpsc::unbounded_channel();
                outgoing.data = Some(orders);
                let (roster, inputs) = (self.roster.clone(), self.inputs.clone());
                let (what, closed) = ((transfer, peer, header), outgoing.closed.clone());
                let what = (what, usize::from(streams));
                tokio::spawn(streams::send(roster, what, ordered, closed, inputs));
            }
            SenderOutput::SendChunk { transfer, frame, blocks, names } => {
                if let Some(outgoing) = self.served.get_mut(&transfer) {
                    outgoing.chunk = Some((frame, names));
                    self.replica.pool(PoolCommand::Read { transfer, blocks });
                }
            }
            SenderOutput::SendCommit { transfer, frame, last } => {
                if let Some(Outgoing { data: Some(data), .. }) = self.served.get(&transfer) {
                    let _ = data.send(SendOrder::Commit { frame, last });
                }
            }
            SenderOutput::Unpin { blocks } => self.replica.pool(PoolCommand::Release { blocks }),
            SenderOutput::Close { transfer } => {
                if let Some(outgoing) = self.served.get_mut(&transfer) {
                    outgoing.control = None;
                    outgoing.data = None;
                    outgoing.closed.cancel();
                }
            }
            SenderOutput::Ended { transfer, sent, outcome } => {
                self.counters.served(&outcome);
                tracing::debug!(transfer = transfer.0, sent, ?outcome, "a transfer has ended");
                self.served.remove(&transfer);
            }
        }
    }
}
