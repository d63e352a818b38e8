//! Frames on quinn streams, with every bound.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use protocol::frame::{Frame, FrameError, HEADER_BYTES, Header};
use thiserror::Error;

/// Reads frames from one stream.
pub(crate) struct FrameReader {
    stream: quinn::RecvStream,
    bytes_max: usize,
}

/// Writes frames to one stream.
pub(crate) struct FrameWriter {
    stream: quinn::SendStream,
}

/// Both directions of a stream on which frames go.
pub struct FrameStream {
    pub(crate) reader: FrameReader,
    pub(crate) writer: FrameWriter,
    pub(crate) rate: Arc<FrameRate>,
    pub(crate) stream_timeout: Duration,
}

/// A stream on which a member sends KV blocks.
pub struct DataStream {
    pub(crate) reader: FrameReader,
    pub(crate) rate: Arc<FrameRate>,
}

/// Why a stream has no further frame.
#[derive(Debug, Error)]
pub enum StreamError {
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("more than {per_second} frames per second")]
    Flood { per_second: u32 },
    #[error("nothing for {} s", after.as_secs())]
    Timeout { after: Duration },
    #[error("the stream ended inside a frame")]
    Cut,
    #[error("the stream is gone: {0}")]
    Gone(String),
}

impl StreamError {
    /// Whether no honest node does this.
    pub(crate) fn is_misbehaviour(&self) -> bool {
        matches!(self, StreamError::Frame(_) | StreamError::Flood { .. })
    }
}

impl FrameReader {
    pub fn new(stream: quinn::RecvStream, bytes_max: usize) -> Self {
        FrameReader { stream, bytes_max }
    }

    /// The next frame; `None` at the end of the stream. Dropping the future in the middle loses bytes:
    /// the stream is of no use then.
    pub async fn next(&mut self, rate: &FrameRate) -> Result<Option<Frame>, StreamError> {
        let mut header = [0; HEADER_BYTES];
        match self.stream.read_exact(&mut header).await {
            Ok(()) => {}
            Err(quinn::ReadExactError::FinishedEarly(0)) => return Ok(None),
            Err(error) => return Err(gone(error)),
        }
        rate.count()?;
        let header = Header::decode(header, self.bytes_max)?;
        // Grows with what arrives, so that a length alone claims no memory.
        let mut body = Vec::new();
        while body.len() < header.bytes {
            let want = (header.bytes - body.len()).min(READ_BYTES_MAX);
            let chunk = self.stream.read_chunk(want, true).await;
            match chunk.map_err(|e| StreamError::Gone(e.to_string()))? {
                Some(chunk) => body.extend_from_slice(&chunk.bytes),
                None => return Err(StreamError::Cut),
            }
        }
        Ok(Some(Frame { kind: header.kind, body }))
    }

    /// The next `bytes` bytes, which are in no frame: in pieces, as they came.
    pub async fn payload(&mut self, bytes: usize) -> Result<Vec<Bytes>, StreamError> {
        let (mut pieces, mut left) = (Vec::new(), bytes);
        while left > 0 {
            let piece = self.stream.read_chunk(left, true).await;
            match piece.map_err(|e| StreamError::Gone(e.to_string()))? {
                Some(piece) => {
                    left -= piece.bytes.len();
                    pieces.push(piece.bytes);
                }
                None => return Err(StreamError::Cut),
            }
        }
        Ok(pieces)
    }

    /// Tells the peer that nothing more is read.
    pub fn stop(&mut self) {
        let _ = self.stream.stop(quinn::VarInt::from_u32(0));
    }

    /// As [`FrameReader::next`], within a time.
    pub async fn next_within(
        &mut self,
        rate: &FrameRate,
        after: Duration,
    ) -> Result<Option<Frame>, StreamError> {
        tokio::time::timeout(after, self.next(rate))
            .await
            .unwrap_or(Err(StreamError::Timeout { after }))
    }
}

impl FrameWriter {
    pub fn new(stream: quinn::SendStream) -> Self {
        FrameWriter { stream }
    }

    /// Writes a frame; a peer that does not take it within `after` loses the stream.
    pub async fn send(&mut self, frame: &Frame, after: Duration) -> Result<(), StreamError> {
        let bytes = frame.encode();
        let written = tokio::time::timeout(after, self.stream.write_all(&bytes)).await;
        match written {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(StreamError::Gone(error.to_string())),
            Err(_) => {
                let _ = self.stream.reset(quinn::VarInt::from_u32(0));
                Err(StreamError::Timeout { after })
            }
        }
    }

    /// Writes bytes that are in no frame, without a copy.
    pub async fn payload(&mut self, bytes: Bytes) -> Result<(), StreamError> {
        self.stream.write_chunk(bytes).await.map_err(|e| StreamError::Gone(e.to_string()))
    }

    /// Among the streams of a connection the higher goes first; 0 is usual.
    pub fn set_priority(&self, priority: i32) {
        let _ = self.stream.set_priority(priority);
    }

    /// Breaks the stream off: what the peer has not read is of no use.
    pub fn reset(&mut self) {
        let _ = self.stream.reset(quinn::VarInt::from_u32(0));
    }

    /// Ends the stream; what was written still arrives.
    pub fn finish(&mut self) {
        let _ = self.stream.finish();
    }

    /// Returns when the peer does not want more, or is gone.
    pub fn stopped(&self) -> impl Future<Output = ()> + Send + 'static {
        let stopped = self.stream.stopped();
        async {
            let _ = stopped.await;
        }
    }

    /// Waits until the peer has all of it, or a time is over.
    pub async fn drained(&mut self, after: Duration) {
        let _ = tokio::time::timeout(after, self.stream.stopped()).await;
    }
}

/// Counts the frames of one connection.
pub(crate) struct FrameRate {
    per_second: u32,
    bucket: Mutex<(Instant, u32)>,
}

impl FrameRate {
    pub fn new(per_second: u32) -> Self {
        FrameRate { per_second, bucket: Mutex::new((Instant::now(), 0)) }
    }

    fn count(&self) -> Result<(), StreamError> {
        let mut bucket = self.bucket.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if bucket.0.elapsed() >= Duration::from_secs(1) {
            *bucket = (Instant::now(), 0);
        }
        bucket.1 += 1;
        match bucket.1 > self.per_second {
            true => Err(StreamError::Flood { per_second: self.per_second }),
            false => Ok(()),
        }
    }
}

fn gone(error: quinn::ReadExactError) -> StreamError {
    match error {
        quinn::ReadExactError::FinishedEarly(_) => StreamError::Cut,
        quinn::ReadExactError::ReadError(error) => StreamError::Gone(error.to_string()),
    }
}

const READ_BYTES_MAX: usize = 64 << 10;
