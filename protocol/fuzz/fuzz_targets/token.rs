//! Any text as a token; and any bytes under a right checksum, which random text never has.
#![no_main]

use libfuzzer_sys::fuzz_target;
use protocol::identity::Invite;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Ok(invite) = text.parse::<Invite>()
    {
        assert!(invite.to_string().parse::<Invite>().is_ok());
    }
    let _ = Invite::from_wire(bytes);
});
