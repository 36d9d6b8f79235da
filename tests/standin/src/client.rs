//! A client as an agent is one: a list of servers, one connection, kept.

use std::error::Error as _;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tonic::Request;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic_prost::ProstCodec;

use super::protocol::{COLLECT, Commands, InstancePing, KEEP_ALIVE, Segment};

/// Longer than a second SYN takes (1 s), so that a lost SYN is seen as late and not as an error.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
const SERVICE: &str = "standin";

/// How a connect ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It stands.
    Connected,
    /// A RST answered the SYN.
    Refused,
    /// Anything else; nothing came in five seconds, mostly.
    Failed(ErrorKind),
}

/// One connect.
#[derive(Clone, Copy, Debug)]
pub struct Attempt {
    /// Where to.
    pub to: SocketAddr,
    /// How it ended.
    pub ending: Ending,
    /// From the SYN to that end.
    pub took: Duration,
}

/// A client. Its connection stays until it is dropped; where the server breaks it, the next call
/// opens a new one, from the first server on.
pub struct Client {
    channel: Grpc<Channel>,
    instance: String,
    attempts: Arc<Mutex<Vec<Attempt>>>,
}

impl Client {
    /// Tries the servers in this order until one takes the connection. Says what it tried in any
    /// case.
    pub async fn connect(
        instance: String,
        servers: Vec<SocketAddr>,
    ) -> (Option<Self>, Vec<Attempt>) {
        let attempts = Arc::new(Mutex::new(Vec::new()));
        let recorder = Arc::clone(&attempts);
        let connector = tower::service_fn(move |_| connect(servers.clone(), Arc::clone(&recorder)));
        let channel = Endpoint::from_static("http://oap.invalid")
            .connect_with_connector(connector)
            .await;
        let tried = copy(&attempts);
        let client = channel.ok().map(|channel| Self {
            channel: Grpc::new(channel),
            instance,
            attempts,
        });
        (client, tried)
    }

    /// Speaks on this connection. When it ends, every call fails.
    ///
    /// # Errors
    /// When it ends at once.
    pub async fn over(
        instance: String,
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    ) -> io::Result<Self> {
        let mut stream = Some(stream);
        let connector = tower::service_fn(move |_| {
            let taken = stream.take().map(TokioIo::new);
            std::future::ready(taken.ok_or(io::Error::from(ErrorKind::NotConnected)))
        });
        let channel = Endpoint::from_static("http://oap.invalid")
            .connect_with_connector(connector)
            .await;
        Ok(Self {
            channel: Grpc::new(channel.map_err(io::Error::other)?),
            instance,
            attempts: Arc::default(),
        })
    }

    /// The connects so far: more than at first means that the connection was lost.
    pub fn attempts(&self) -> usize {
        copy(&self.attempts).len()
    }

    /// Says that it lives: one unary call. One that has not left when the connection ends is made
    /// again, as gRPC's own clients do
    /// (<https://github.com/grpc/proposal/blob/master/A6-client-retries.md#transparent-retries>).
    ///
    /// # Errors
    /// That of the call.
    pub async fn ping(&mut self) -> Result<(), tonic::Status> {
        match self.ping_once().await {
            Err(status) if has_not_left(&status) => self.ping_once().await,
            outcome => outcome,
        }
    }

    async fn ping_once(&mut self) -> Result<(), tonic::Status> {
        let ping = InstancePing {
            service: SERVICE.to_owned(),
            service_instance: self.instance.clone(),
        };
        self.ready().await?;
        let codec = ProstCodec::<InstancePing, Commands>::default();
        self.channel
            .unary(
                Request::new(ping),
                PathAndQuery::from_static(KEEP_ALIVE),
                codec,
            )
            .await?;
        Ok(())
    }

    /// Hands over so many segments in one stream.
    ///
    /// # Errors
    /// That of the call.
    pub async fn report(&mut self, segments: usize) -> Result<(), tonic::Status> {
        let instance = self.instance.clone();
        let stream = tokio_stream::iter((0..segments).map(move |number| Segment {
            trace_id: format!("{instance}.{number}"),
            trace_segment_id: format!("{instance}.{number}.0"),
            service: SERVICE.to_owned(),
            service_instance: instance.clone(),
        }));
        self.ready().await?;
        let codec = ProstCodec::<Segment, Commands>::default();
        self.channel
            .client_streaming(
                Request::new(stream),
                PathAndQuery::from_static(COLLECT),
                codec,
            )
            .await?;
        Ok(())
    }

    async fn ready(&mut self) -> Result<(), tonic::Status> {
        let ready = self.channel.ready().await;
        ready.map_err(|error| tonic::Status::unavailable(error.to_string()))
    }
}

/// hyper cancels nothing but what is still in its queue.
fn has_not_left(status: &tonic::Status) -> bool {
    let mut source = status.source();
    while let Some(error) = source {
        let error_of_hyper = error.downcast_ref::<hyper::Error>();
        if error_of_hyper.is_some_and(hyper::Error::is_canceled) {
            return true;
        }
        source = error.source();
    }
    false
}

async fn connect(
    servers: Vec<SocketAddr>,
    attempts: Arc<Mutex<Vec<Attempt>>>,
) -> io::Result<TokioIo<TcpStream>> {
    let mut last = io::Error::new(ErrorKind::AddrNotAvailable, "no server was named");
    for to in servers {
        let began = Instant::now();
        let connected = tokio::time::timeout(CONNECT_WITHIN, TcpStream::connect(to)).await;
        let result = connected.unwrap_or_else(|_| Err(ErrorKind::TimedOut.into()));
        let ending = match &result {
            Ok(_) => Ending::Connected,
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ending::Refused,
            Err(error) => Ending::Failed(error.kind()),
        };
        let attempt = Attempt {
            to,
            ending,
            took: began.elapsed(),
        };
        attempts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(attempt);
        match result {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                return Ok(TokioIo::new(stream));
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn copy(attempts: &Mutex<Vec<Attempt>>) -> Vec<Attempt> {
    attempts
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone()
}

#[cfg(test)]
mod tests {
    use super::{Client, Ending};
    use crate::{listen, serve};

    #[tokio::test]
    async fn a_client_passes_over_a_server_that_refuses_and_keeps_its_connection() {
        let closed = listen("127.0.0.1:0".parse().unwrap(), 1).unwrap();
        let refuses = closed.local_addr().unwrap();
        drop(closed);
        let listener = listen("[::1]:0".parse().unwrap(), 1).unwrap();
        let serves = listener.local_addr().unwrap();
        tokio::spawn(serve(listener));

        let (client, attempts) = Client::connect("one".to_owned(), vec![refuses, serves]).await;
        let endings: Vec<_> = attempts
            .iter()
            .map(|attempt| (attempt.to, attempt.ending))
            .collect();
        assert_eq!(
            endings,
            [(refuses, Ending::Refused), (serves, Ending::Connected)]
        );
        let mut client = client.unwrap();
        client.ping().await.unwrap();
        client.report(3).await.unwrap();
        assert_eq!(client.attempts(), 2);
    }

    #[tokio::test]
    async fn a_client_that_nobody_takes_says_what_it_tried() {
        let closed = listen("127.0.0.1:0".parse().unwrap(), 1).unwrap();
        let refuses = closed.local_addr().unwrap();
        drop(closed);
        let (client, attempts) = Client::connect("one".to_owned(), vec![refuses]).await;
        assert!(client.is_none());
        assert_eq!(attempts[0].ending, Ending::Refused);
    }
}
