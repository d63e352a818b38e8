//! Any bytes as a journal, as a part of a stream and as the messages that copy them. What is accepted has
//! one encoding that gives it again, and bounded memory.
#![no_main]

use libfuzzer_sys::fuzz_target;
use protocol::backup::{Fetch, Fetched, Keep, Kept};
use protocol::journal::{self, StreamPart};

macro_rules! once_and_again {
    ($bytes:ident: $($message:ident),*) => {$(
        if let Ok(message) = $message::from_bytes($bytes) {
            // Compared as bytes: any bits can stand for a log-probability, and not all equal themselves.
            let again = message.to_bytes();
            assert_eq!($message::from_bytes(&again).map(|m| m.to_bytes()), Ok(again));
        }
    )*};
}

fuzz_target!(|bytes: &[u8]| {
    if let Ok(entries) = journal::from_bytes(bytes) {
        let again = journal::to_bytes(&entries);
        assert_eq!(journal::from_bytes(&again).map(|e| journal::to_bytes(&e)), Ok(again));
    }
    once_and_again!(bytes: StreamPart, Keep, Kept, Fetch, Fetched);
});
