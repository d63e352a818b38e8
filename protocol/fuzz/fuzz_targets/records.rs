//! Any bytes as a node record. What is accepted keeps to the bounds, so that its owner's writer would
//! have left nothing out of it, and comes back as it was.
#![no_main]

use libfuzzer_sys::fuzz_target;
use protocol::node_record::NodeRecord;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(record) = NodeRecord::from_bytes(bytes) {
        let (again, left_out) = record.to_bytes();
        assert_eq!(left_out, 0);
        assert_eq!(NodeRecord::from_bytes(&again), Ok(record));
    }
});
