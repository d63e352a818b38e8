//! How patient a client is.

use std::time::Duration;

/// Bounds of a [`Client`](crate::Client).
#[derive(Clone, Debug)]
pub struct ClientOptions {
    /// Time for a connection to come about. Too small: slow links fail. Too large: a host that is off
    /// holds each request up for as long.
    pub connect_timeout: Duration,
    /// Silence in a stream, in which nodes send a comment each 15 s, after which its endpoint counts as
    /// broken. Too small: nodes that are well are left in the middle of answers. Too large: a path that
    /// lost everything holds a stream for as long.
    pub silence_max: Duration,
    /// Silence after which an endpoint is asked whether it lives (`/healthz`), and how long it may take
    /// to say so; one that does not is broken at once. A stopped host is noticed after twice this time.
    /// Too small: busy nodes are left. Too large: clients wait for the dead.
    pub probe_after: Duration,
    /// Time for a call with all its attempts, sent to the node with each of them. A node bounds it by
    /// its own limit. Too small: long answers break off. Too large: forgotten calls hold places.
    pub deadline: Duration,
    /// Attempts in a row that bring nothing new, over all endpoints; after an event the count begins
    /// anew. Too small: a node that starts again is not awaited (8 attempts at one endpoint take some
    /// 9 s). Too large: a call to a mesh that is gone fails late.
    pub attempts_max: u32,
    /// Age after which, during calls, nodes are asked anew where else the API is; `None`: never, and
    /// only the endpoints that were given are asked. Too small: needless requests. Too large: nodes that
    /// came since are unknown when the others fail.
    pub refresh_after: Option<Duration>,
}

impl Default for ClientOptions {
    fn default() -> Self {
        ClientOptions {
            connect_timeout: Duration::from_secs(2),
            silence_max: Duration::from_secs(45),
            probe_after: Duration::from_secs(3),
            deadline: Duration::from_secs(3600),
            attempts_max: 8,
            refresh_after: Some(Duration::from_secs(10)),
        }
    }
}
