//! The server.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use tokio::net::{TcpListener, TcpSocket};
use tokio_stream::StreamExt;
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service, http};
use tonic::server::{ClientStreamingService, Grpc, UnaryService};
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;

use super::protocol::{COLLECT, Commands, InstancePing, KEEP_ALIVE, Segment};

/// Listens, with `SO_REUSEADDR`; an IPv6 wildcard takes IPv4 connections too, as an OAP's does.
///
/// # Errors
/// That of the system: the address is in use, or not of this machine.
pub fn listen(address: SocketAddr, backlog: u32) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(backlog)
}

/// Serves both calls on every connection, for ever.
///
/// # Errors
/// When connections can't be accepted any more.
pub async fn serve(listener: TcpListener) -> Result<(), tonic::transport::Error> {
    serve_counting(listener, Arc::default()).await
}

/// The same, and counts the calls.
///
/// # Errors
/// As [`serve`].
pub async fn serve_counting(
    listener: TcpListener,
    calls: Arc<AtomicU64>,
) -> Result<(), tonic::transport::Error> {
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let oap = Oap { calls };
    Server::builder().serve_with_incoming(oap, incoming).await
}

#[derive(Clone)]
struct Oap {
    calls: Arc<AtomicU64>,
}

impl Service<http::Request<Body>> for Oap {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        self.calls.fetch_add(1, Ordering::Relaxed);
        let oap = self.clone();
        Box::pin(async move {
            Ok(match request.uri().path() {
                KEEP_ALIVE => {
                    Grpc::new(ProstCodec::<Commands, InstancePing>::default())
                        .unary(oap, request)
                        .await
                }
                COLLECT => {
                    Grpc::new(ProstCodec::<Commands, Segment>::default())
                        .client_streaming(oap, request)
                        .await
                }
                path => Status::unimplemented(format!("the stand-in has no {path}")).into_http(),
            })
        })
    }
}

impl UnaryService<InstancePing> for Oap {
    type Response = Commands;
    type Future = BoxFuture<Response<Commands>, Status>;

    fn call(&mut self, request: Request<InstancePing>) -> Self::Future {
        Box::pin(async move {
            if request.get_ref().service_instance.is_empty() {
                return Err(Status::invalid_argument("a ping without serviceInstance"));
            }
            Ok(Response::new(Commands {}))
        })
    }
}

impl ClientStreamingService<Segment> for Oap {
    type Response = Commands;
    type Future = BoxFuture<Response<Commands>, Status>;

    fn call(&mut self, request: Request<Streaming<Segment>>) -> Self::Future {
        Box::pin(async move {
            let mut segments = request.into_inner();
            while let Some(segment) = segments.next().await {
                segment?;
            }
            Ok(Response::new(Commands {}))
        })
    }
}
