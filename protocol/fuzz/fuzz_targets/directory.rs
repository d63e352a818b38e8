//! Any bytes as messages of the directory of KV blocks. What is accepted keeps to its bounds and has one
//! encoding that gives it again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use protocol::directory::{Found, HOLDERS_MAX, Heard, NAMES_MAX, News, Query, Report};

macro_rules! once_and_again {
    ($bytes:ident: $($message:ident),*) => {$(
        if let Ok(message) = $message::from_bytes($bytes) {
            assert_eq!($message::from_bytes(&message.to_bytes()), Ok(message));
        }
    )*};
}

fuzz_target!(|bytes: &[u8]| {
    once_and_again!(bytes: Report, Heard, Query, Found);
    if let Ok(Report { news: News::Blocks { first, events, piece, .. }, .. }) =
        Report::from_bytes(bytes)
    {
        assert!(first.checked_add(events.iter().count() as u64).is_some());
        assert!(events.len() <= NAMES_MAX);
        if let Some(piece) = piece {
            assert!(piece.first <= piece.last && piece.names.len() <= NAMES_MAX);
            assert!(piece.names.windows(2).all(|pair| pair[0] < pair[1]));
        }
    }
    if let Ok(found) = Found::from_bytes(bytes) {
        assert!(found.holders.len() <= HOLDERS_MAX);
    }
});
