//! Streams of libp2p on a connection of the node's endpoint.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use libp2p::core::muxing::{StreamMuxer, StreamMuxerEvent};
use libp2p::futures::{AsyncRead, AsyncWrite};
use quinn::{RecvStream, SendStream};

use super::limits::{CONNECTION_WINDOW, STREAMS_PER_CONNECTION};
use crate::mesh::quic::{Link, LinkError};

/// A connection as libp2p uses it. Dropping it closes the connection with all its streams.
pub(super) struct Muxer {
    link: Link,
    inbound: Option<Opening>,
    outbound: Option<Opening>,
    closing: Option<BoxFuture<'static, ()>>,
}

type Opening = BoxFuture<'static, Result<(SendStream, RecvStream), LinkError>>;

impl Muxer {
    pub(super) fn new(link: Link) -> Muxer {
        link.allow_bytes(CONNECTION_WINDOW);
        link.allow_streams(STREAMS_PER_CONNECTION);
        Muxer { link, inbound: None, outbound: None, closing: None }
    }
}

impl Drop for Muxer {
    fn drop(&mut self) {
        self.link.close(0, "done");
    }
}

impl StreamMuxer for Muxer {
    type Substream = Substream;
    type Error = LinkError;

    fn poll_inbound(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Substream, LinkError>> {
        let link = self.link.clone();
        let opening =
            self.inbound.get_or_insert_with(|| async move { link.accept().await }.boxed());
        let opened = ready!(opening.poll_unpin(cx));
        self.inbound = None;
        Poll::Ready(opened.map(Substream::new))
    }

    fn poll_outbound(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Substream, LinkError>> {
        let link = self.link.clone();
        let opening = self.outbound.get_or_insert_with(|| async move { link.open().await }.boxed());
        let opened = ready!(opening.poll_unpin(cx));
        self.outbound = None;
        Poll::Ready(opened.map(Substream::new))
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), LinkError>> {
        let link = self.link.clone();
        let closing = self.closing.get_or_insert_with(|| {
            link.close(0, "done");
            async move { link.closed().await }.boxed()
        });
        closing.poll_unpin(cx).map(Ok)
    }

    /// Whoever moves to another address keeps the one that libp2p knows: the data plane has its own.
    fn poll(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Result<StreamMuxerEvent, LinkError>> {
        Poll::Pending
    }
}

/// A stream both ways. Dropping it finishes what was sent and takes nothing more.
pub(super) struct Substream {
    send: SendStream,
    receive: RecvStream,
}

impl Substream {
    fn new((send, receive): (SendStream, RecvStream)) -> Substream {
        Substream { send, receive }
    }
}

impl AsyncRead for Substream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        self.receive.poll_read(cx, buffer).map_err(io::Error::from)
    }
}

impl AsyncWrite for Substream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.send).poll_write(cx, bytes).map_err(io::Error::from)
    }

    /// QUIC sends by itself what was written.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// May be called again: a stream that is finished or stopped already is closed.
    fn poll_close(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let _ = self.send.finish();
        Poll::Ready(Ok(()))
    }
}
