//! The shared structures as aya wants them.

use aya::Pod;
use balancer_common::abi::{
    Backend, Connection, EndpointGroupInfo, EndpointInfo, ExemptKey, Frontend, FrontendKey,
    ListenRule, MovingSocket, PortKey, ServiceInfo, ServicePort,
};

/// A value that a map holds byte by byte.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Plain<T>(pub T);

macro_rules! plain {
    ($($type:ty),*) => {
        $(
            #[expect(unsafe_code, reason = "aya's marker for plain data; the layout is asserted in balancer_common::abi")]
            // SAFETY: repr(C) of integers without padding: every byte is initialised, every bit
            // pattern is valid.
            unsafe impl Pod for Plain<$type> {}
        )*
    };
}

plain!(
    Backend,
    Connection,
    EndpointGroupInfo,
    EndpointInfo,
    ExemptKey,
    Frontend,
    FrontendKey,
    ListenRule,
    MovingSocket,
    PortKey,
    ServiceInfo,
    ServicePort
);
