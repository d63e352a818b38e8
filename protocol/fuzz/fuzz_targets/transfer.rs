//! Any bytes as a frame of a KV transfer. What is accepted keeps to its bounds and has one encoding that
//! gives it again.
#![no_main]

use std::fmt::Debug;

use libfuzzer_sys::fuzz_target;
use protocol::frame::{Frame, Kind};
use protocol::transfer::{
    KV_BLOCKS_MAX, KV_CHUNK_BLOCKS_MAX, KV_FRAME_BYTES_MAX, KV_STREAMS_MAX, KvAsk, KvChunk, KvCommit,
    KvFrameError,
    KvPart, KvProgress, KvRefusal, KvStream, value,
};

fn again<T: bincode::Encode + PartialEq + Debug>(
    frame: &Frame,
    read: impl Fn(&Frame) -> Result<T, KvFrameError>,
) -> Option<T> {
    let value = read(frame).ok()?;
    assert_eq!(read(&Frame::new(frame.kind, &value)).as_ref(), Ok(&value));
    Some(value)
}

fuzz_target!(|bytes: &[u8]| {
    let Ok(frame) = Frame::decode(bytes, KV_FRAME_BYTES_MAX) else { return };
    if let Some(ask) = again(&frame, KvAsk::from_frame) {
        assert!((1..=KV_BLOCKS_MAX).contains(&ask.wanted.len()));
    }
    if let Some(chunk) = again(&frame, KvChunk::from_frame) {
        assert!((1..=KV_CHUNK_BLOCKS_MAX).contains(&(chunk.blocks as usize)));
    }
    if let Some(commit) = again(&frame, KvCommit::from_frame) {
        assert!(commit.digests.len() <= KV_CHUNK_BLOCKS_MAX);
        assert!(!commit.digests.is_empty() || commit.end.is_some());
    }
    again(&frame, |frame| value::<KvRefusal>(frame, Kind::KV_REFUSAL));
    again(&frame, |frame| value::<KvProgress>(frame, Kind::KV_PROGRESS));
    if let Some(stream) = again(&frame, KvStream::from_frame) {
        assert!((1..=KV_STREAMS_MAX).contains(&stream.parts.into()));
    }
    if let Some(part) = again(&frame, KvPart::from_frame) {
        assert!((1..KV_STREAMS_MAX).contains(&part.part.into()));
    }
});
