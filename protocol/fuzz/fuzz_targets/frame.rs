//! Any bytes as a frame, and its body as whatever its kind says. What can be decoded has one encoding
//! that gives it again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use protocol::frame::Frame;
use protocol::identity::join::{JOIN_FRAME_BYTES_MAX, decode_any};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(frame) = Frame::decode(bytes, JOIN_FRAME_BYTES_MAX) {
        let _ = decode_any(&frame);
        let again = Frame::decode(&frame.encode(), JOIN_FRAME_BYTES_MAX);
        assert_eq!(again.as_ref(), Ok(&frame));
    }
});
