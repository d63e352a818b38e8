//! The data streams of one transfer: frames on the first, payloads dealt out to all of them.
//!
//! A stream has a window of its own, so that as many streams as the path is worth have as many windows on
//! their way. Stripes are written and read in the order of their numbers: who waits for room, or for
//! bytes, waits for those that are due next.

use std::ops::Range;

use bytes::Bytes;
use protocol::frame::{Frame, Kind};
use protocol::transfer::{KV_STRIPE_BYTES, KvPart, KvStream};
use tokio::sync::mpsc;

use crate::mesh::{DataStream, FrameReader, FrameWriter};

/// Whose turn it is.
#[derive(Clone, Copy, Debug)]
struct Deal {
    streams: usize,
    next: usize,
}

impl Deal {
    fn new(streams: usize) -> Self {
        Deal { streams, next: 0 }
    }

    /// The stripes of the next payload, and the stream of each. A single stream gets it whole.
    fn payload(&mut self, bytes: usize) -> impl Iterator<Item = (usize, Range<usize>)> + use<> {
        let stripe_bytes = if self.streams == 1 { bytes.max(1) } else { KV_STRIPE_BYTES };
        let (first, streams) = (self.next, self.streams);
        let stripes = bytes.div_ceil(stripe_bytes);
        self.next = (first + stripes) % streams;
        (0..stripes).map(move |n| {
            let begin = n * stripe_bytes;
            ((first + n) % streams, begin..bytes.min(begin + stripe_bytes))
        })
    }
}

/// The side that receives.
pub(super) struct StripedReader {
    data: DataStream,
    header: KvStream,
    /// Where the further streams come from, in any order.
    parted: Option<mpsc::Receiver<(KvPart, DataStream)>>,
    /// Those that have come, from number 1 on.
    others: Vec<Option<FrameReader>>,
    deal: Deal,
}

impl StripedReader {
    /// The header has been read of `data`.
    pub fn new(
        data: DataStream,
        header: KvStream,
        parted: Option<mpsc::Receiver<(KvPart, DataStream)>>,
    ) -> Self {
        let streams = usize::from(header.parts.max(1));
        let others = (1..streams).map(|_| None).collect();
        StripedReader { data, header, parted, others, deal: Deal::new(streams) }
    }

    /// The next frame; `None` at the end, and where nothing can be read any more.
    pub async fn next(&mut self) -> Option<Frame> {
        self.data.reader.next(&self.data.rate).await.ok()?
    }

    /// The next payload, in pieces as they came; `None` where there is none.
    pub async fn payload(&mut self, bytes: usize) -> Option<Vec<Bytes>> {
        let mut pieces = Vec::new();
        for (stream, stripe) in self.deal.payload(bytes) {
            let reader = match stream.checked_sub(1) {
                None => &mut self.data.reader,
                Some(other) => {
                    while self.others[other].is_none() {
                        let parted = self.parted.as_mut()?;
                        let (part, data) = parted.recv().await?;
                        take(&mut self.others, &self.header, part, data)?;
                    }
                    self.others[other].as_mut()?
                }
            };
            let came = reader.payload(stripe.len()).await.ok()?;
            match pieces.is_empty() {
                true => pieces = came,
                false => pieces.extend(came),
            }
        }
        Some(pieces)
    }

    /// Tells the peer that nothing more is read.
    pub fn stop(&mut self) {
        self.data.reader.stop();
        self.others.iter_mut().flatten().for_each(FrameReader::stop);
    }
}

/// Puts a further stream to its place; `None` if it has none.
fn take(
    others: &mut [Option<FrameReader>],
    header: &KvStream,
    part: KvPart,
    data: DataStream,
) -> Option<()> {
    let place = others.get_mut(usize::from(part.part).checked_sub(1)?)?;
    if part.request != header.request || place.is_some() {
        return None;
    }
    *place = Some(data.reader);
    Some(())
}

/// The side that sends.
pub(super) struct StripedWriter {
    writers: Vec<FrameWriter>,
    deal: Deal,
}

impl StripedWriter {
    /// Says on each of the streams, at least one, what it is; `None` if they are broken.
    pub async fn begin(writers: Vec<FrameWriter>, header: KvStream) -> Option<StripedWriter> {
        let KvStream { request, attempt, .. } = header;
        let parts = u8::try_from(writers.len()).ok()?;
        let mut this = StripedWriter { deal: Deal::new(writers.len()), writers };
        for (writer, part) in this.writers.iter_mut().zip(0..) {
            // Tokens of other requests go first.
            writer.set_priority(PRIORITY);
            let frame = match part {
                0 => Frame::new(Kind::KV_STREAM, &KvStream { parts, ..header }),
                _ => Frame::new(Kind::KV_PART, &KvPart { request, attempt, part }),
            };
            writer.payload(frame.encode().into()).await.ok()?;
        }
        Some(this)
    }

    pub async fn frame(&mut self, frame: &Frame) -> Option<()> {
        self.writers[0].payload(frame.encode().into()).await.ok()
    }

    pub async fn payload(&mut self, payload: Bytes) -> Option<()> {
        for (stream, stripe) in self.deal.payload(payload.len()) {
            self.writers[stream].payload(payload.slice(stripe)).await.ok()?;
        }
        Some(())
    }

    /// What was written still arrives.
    pub fn finish(&mut self) {
        self.writers.iter_mut().for_each(FrameWriter::finish);
    }

    /// Breaks off what is not finished.
    pub fn reset(&mut self) {
        self.writers.iter_mut().for_each(FrameWriter::reset);
    }
}

/// Of blocks against everything else on a connection.
const PRIORITY: i32 = -1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stripes_cover_a_payload_in_turns() {
        const S: usize = KV_STRIPE_BYTES;
        let check = |streams, payloads: &[usize], expect: &[(usize, Range<usize>)]| {
            let mut deal = Deal::new(streams);
            let dealt: Vec<_> = payloads.iter().flat_map(|&bytes| deal.payload(bytes)).collect();
            assert_eq!(dealt, expect, "{streams} streams, {payloads:?}");
        };
        check(1, &[3 * S, 5], &[(0, 0..3 * S), (0, 0..5)]);
        check(2, &[S], &[(0, 0..S)]);
        check(2, &[S + 1, 7], &[(0, 0..S), (1, S..S + 1), (0, 0..7)]);
        // the turn goes on over payloads, whose last stripes may be short
        check(
            3,
            &[S + 9, S + 9, S],
            &[(0, 0..S), (1, S..S + 9), (2, 0..S), (0, S..S + 9), (1, 0..S)],
        );
        check(3, &[0, 1], &[(0, 0..1)]);
    }
}
