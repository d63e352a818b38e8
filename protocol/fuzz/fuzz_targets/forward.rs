//! Any bytes as the head of a forwarded request, and as the head of its answer. What is accepted has
//! one encoding that gives it again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use protocol::forward::{Forward, ForwardReply, HEAD_BYTES_MAX};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(head) = Forward::from_bytes(bytes) {
        let again = head.to_bytes();
        assert!(again.len() <= HEAD_BYTES_MAX);
        assert_eq!(Forward::from_bytes(&again), Ok(head));
    }
    if let Ok(head) = ForwardReply::from_bytes(bytes) {
        let again = head.to_bytes();
        assert!(again.len() <= HEAD_BYTES_MAX);
        assert_eq!(ForwardReply::from_bytes(&again), Ok(head));
    }
});
