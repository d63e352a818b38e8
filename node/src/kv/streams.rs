//! The streams of a transfer: each a task that reads or writes and tells the machines' task.
//!
//! They wait for their peer as long as their order is good; the machines keep the time and end them.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use cache::BlockHash;
use cache::transfer::{AttemptId, BlockDigest, StreamId, TransferId};
use protocol::NodeId;
use protocol::frame::{Frame, Kind};
use protocol::transfer::{KvChunk, KvStream};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::stripes::{StripedReader, StripedWriter};
use super::transfers::Input;
use crate::mesh::{FrameStream, Roster};

/// What the task of a data stream that came in shall do about the chunk that it has announced.
pub(super) enum DataOrder {
    /// Hand over the payloads.
    Read,
    /// They are in their pages: go on.
    Go,
    /// Nothing more is wanted.
    Stop,
}

/// What the task of a data stream that goes out shall send.
pub(super) enum SendOrder {
    Chunk { frame: Frame, names: Vec<BlockHash>, payloads: Vec<Bytes> },
    Commit { frame: Frame, last: bool },
}

/// Asks a peer for blocks and hears it until `close` says whether all was well.
pub(super) async fn ask(
    roster: Arc<Roster>,
    (attempt, peer, ask): (AttemptId, NodeId, Frame),
    mut close: oneshot::Receiver<bool>,
    inputs: mpsc::Sender<Input>,
) {
    let opening = async {
        roster.connect(peer).await.ok()?;
        let mut stream = roster.mesh()?.open_frames(peer).await.ok()?;
        stream.writer.send(&ask, stream.stream_timeout).await.ok()?;
        Some(stream)
    };
    let opened = tokio::select! {
        opened = opening => opened,
        _ = &mut close => return,
    };
    let Some(FrameStream { mut reader, mut writer, rate, .. }) = opened else {
        let _ = inputs.send(Input::ControlClosed { attempt }).await;
        return;
    };
    loop {
        tokio::select! {
            done = &mut close => {
                match done {
                    Ok(true) => writer.finish(),
                    _ => writer.reset(),
                }
                return;
            }
            frame = reader.next(&rate) => {
                let input = match frame {
                    Ok(Some(frame)) => Input::Control { attempt, frame },
                    Ok(None) | Err(_) => Input::ControlClosed { attempt },
                };
                let is_over = matches!(input, Input::ControlClosed { .. });
                if inputs.send(input).await.is_err() || is_over {
                    return;
                }
            }
            () = tokio::time::sleep(QUIET_MAX) => {
                let roster = roster.clone();
                tokio::spawn(async move { roster.look_after(peer).await });
            }
        }
    }
}

/// What a data stream brings, in its order.
enum Came {
    Frame(Frame),
    /// After the announcement of a chunk.
    Payloads(Vec<Vec<Bytes>>),
}

/// Reads a data stream of a peer: ahead, while what came before goes to its pages.
pub(super) async fn receive(
    (stream, block_bytes): (StreamId, usize),
    mut data: StripedReader,
    orders: mpsc::UnboundedReceiver<DataOrder>,
    inputs: mpsc::Sender<Input>,
) {
    let (ahead, came) = mpsc::channel(AHEAD_MAX);
    let reading = async {
        // To its end, or to what cannot be read on after.
        let _ = read_ahead(&mut data, block_bytes, ahead).await;
        std::future::pending().await
    };
    tokio::select! {
        () = reading => {}
        _ = pass_on(stream, came, orders, inputs) => {}
    }
    data.stop();
}

/// `None` at the end of what can be read, or if nobody wants more.
async fn read_ahead(
    data: &mut StripedReader,
    block_bytes: usize,
    ahead: mpsc::Sender<Came>,
) -> Option<()> {
    loop {
        let frame = data.next().await?;
        let announces = frame.kind == Kind::KV_CHUNK;
        let chunk = KvChunk::from_frame(&frame);
        ahead.send(Came::Frame(frame)).await.ok()?;
        if announces {
            let blocks = chunk.ok()?.blocks as usize;
            if blocks > 1 && blocks * block_bytes > CHUNK_BYTES_MAX {
                return None;
            }
            let mut payloads = Vec::with_capacity(blocks);
            for _ in 0..blocks {
                payloads.push(data.payload(block_bytes).await?);
            }
            ahead.send(Came::Payloads(payloads)).await.ok()?;
        }
    }
}

/// Tells the machines' task what came. After a chunk's announcement, and after its payloads, it waits
/// for an order. `None` when the stream is over or to be stopped.
async fn pass_on(
    stream: StreamId,
    mut came: mpsc::Receiver<Came>,
    mut orders: mpsc::UnboundedReceiver<DataOrder>,
    inputs: mpsc::Sender<Input>,
) -> Option<()> {
    loop {
        let next = tokio::select! {
            next = came.recv() => next,
            _ = orders.recv() => return None,
        };
        let Some(Came::Frame(frame)) = next else {
            return inputs.send(Input::DataClosed { stream }).await.ok();
        };
        let announces = frame.kind == Kind::KV_CHUNK;
        inputs.send(Input::Data { stream, frame }).await.ok()?;
        if !announces {
            continue;
        }
        let DataOrder::Read = orders.recv().await? else { return None };
        let payloads = tokio::select! {
            next = came.recv() => next,
            _ = orders.recv() => {
                return inputs.send(Input::PayloadsLost { stream }).await.ok();
            }
        };
        let Some(Came::Payloads(payloads)) = payloads else {
            inputs.send(Input::PayloadsLost { stream }).await.ok()?;
            return inputs.send(Input::DataClosed { stream }).await.ok();
        };
        inputs.send(Input::Payloads { stream, payloads }).await.ok()?;
        let DataOrder::Go = orders.recv().await? else { return None };
    }
}

/// Hears the receiver of a transfer on its control stream, and says what the machine wants said.
pub(super) async fn serve_control(
    transfer: TransferId,
    stream: FrameStream,
    mut frames: mpsc::UnboundedReceiver<Frame>,
    inputs: mpsc::Sender<Input>,
) {
    let FrameStream { mut reader, mut writer, rate, stream_timeout } = stream;
    let write = async move {
        while let Some(frame) = frames.recv().await {
            if writer.send(&frame, stream_timeout).await.is_err() {
                return;
            }
        }
        // The last word may still be on its way.
        writer.finish();
        writer.drained(stream_timeout).await;
    };
    let read = async {
        let finished = loop {
            match reader.next(&rate).await {
                Ok(Some(frame)) => {
                    let input = Input::ServedControl { transfer, frame };
                    if inputs.send(input).await.is_err() {
                        return;
                    }
                }
                Ok(None) => break true,
                Err(_) => break false,
            }
        };
        let _ = inputs.send(Input::ServedClosed { transfer, finished }).await;
        // Reading ends only with the stream: what is written decides when that is.
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = write => {}
        () = read => {}
    }
}

/// Sends the blocks of a transfer. Each chunk is answered, once; `closed` breaks off what is not
/// finished.
pub(super) async fn send(
    roster: Arc<Roster>,
    ((transfer, peer, header), streams): ((TransferId, NodeId, KvStream), usize),
    mut orders: mpsc::UnboundedReceiver<SendOrder>,
    closed: CancellationToken,
    inputs: mpsc::Sender<Input>,
) {
    let opening = async {
        let writers = roster.mesh()?.open_data(peer, streams).await.ok()?;
        StripedWriter::begin(writers, header).await
    };
    let mut writer = tokio::select! {
        writer = opening => writer,
        () = closed.cancelled() => None,
    };
    let mut told = false;
    // After a failure, too, until the machine's task lets go: every chunk has its answer.
    while let Some(order) = orders.recv().await {
        let is_chunk = matches!(order, SendOrder::Chunk { .. });
        let sent = match &mut writer {
            None => None,
            Some(writer) => tokio::select! {
                sent = carry_out(writer, order) => sent,
                () = closed.cancelled() => None,
            },
        };
        match sent {
            Some(Some(digests)) => {
                if inputs.send(Input::Sent { transfer, digests }).await.is_err() {
                    return;
                }
            }
            Some(None) => {}
            None => {
                if let Some(mut writer) = writer.take() {
                    writer.reset();
                }
                if is_chunk {
                    let _ = inputs.send(Input::SendStopped { transfer }).await;
                }
                if !std::mem::replace(&mut told, true) {
                    let _ = inputs.send(Input::SendClosed { transfer }).await;
                }
            }
        }
    }
    // Without effect on a stream that is finished.
    if let Some(writer) = &mut writer
        && closed.is_cancelled()
    {
        writer.reset();
    }
}

/// The digests of a chunk that was sent, or nothing for a commit; `None` if the stream is broken.
async fn carry_out(
    writer: &mut StripedWriter,
    order: SendOrder,
) -> Option<Option<Vec<BlockDigest>>> {
    match order {
        SendOrder::Chunk { frame, names, payloads } => {
            writer.frame(&frame).await?;
            let mut digests = Vec::with_capacity(payloads.len());
            for (payload, name) in payloads.into_iter().zip(&names) {
                digests.push(BlockDigest::of(name, &payload));
                writer.payload(payload).await?;
            }
            Some(Some(digests))
        }
        SendOrder::Commit { frame, last } => {
            writer.frame(&frame).await?;
            if last {
                writer.finish();
            }
            Some(None)
        }
    }
}

/// Silence of a sender after which it is looked after: it gives signs of life more often.
const QUIET_MAX: Duration = Duration::from_millis(350);
/// Frames and payloads that were read and wait: a chunk, its commit and the next chunk. Too small: the
/// path rests while pages are written. Too large: payloads take memory, up to two chunks a stream.
const AHEAD_MAX: usize = 3;
/// Of a chunk of more than one block; a stream that announces more is not read on. Senders make four
/// times smaller ones.
const CHUNK_BYTES_MAX: usize = 4 << 20;
