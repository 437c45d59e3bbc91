//! The two callbacks that the crate `virt` does not wrap, and libvirt's event loop.

use super::DomainEvent;
use std::ffi::CStr;
use std::os::raw::{c_char, c_int, c_void};
use std::sync::OnceLock;
use virt::connect::Connect;
use virt::error::Error;
use virt::sys;

/// Bytes of a UUID as text with its end (`VIR_UUID_STRING_BUFLEN`).
const UUID_TEXT: usize = 37;

/// Where the callbacks report to; called on the event loop's thread, must not block.
pub(super) trait Listener: Send + Sync + 'static {
    /// A domain started or stopped.
    fn domain(&self, event: DomainEvent);
    /// The connection broke.
    fn closed(&self);
}

/// Registers libvirt's default event loop and runs it on a thread for the life of the
/// process; libvirt allows one per process, registered before the first connection.
pub(super) fn start_event_loop() -> Result<(), String> {
    static STARTED: OnceLock<Result<(), String>> = OnceLock::new();
    STARTED
        .get_or_init(|| {
            // libvirt prints every error to stderr unless told otherwise.
            virt::error::clear_error_callback();
            virt::event::event_register_default_impl().map_err(|e| e.to_string())?;
            std::thread::Builder::new()
                .name("libvirt-events".into())
                .spawn(|| {
                    while virt::event::event_run_default_impl().is_ok() {}
                    tracing::error!(
                        "libvirt's event loop ended: domain events are no longer heard"
                    );
                })
                .map(drop)
                .map_err(|e| e.to_string())
        })
        .clone()
}

/// An open connection with its callbacks; dropping it takes them off first, as each of
/// them keeps the connection alive.
pub(super) struct Watched {
    connect: Connect,
    lifecycle: c_int,
}

impl Watched {
    /// Opens `uri` and reports domain life cycles and the connection's end to `listener`.
    pub(super) fn open<L: Listener + Clone>(uri: &str, listener: L) -> Result<Self, Error> {
        let connect = Connect::open(Some(uri))?;
        // Two missed answers in 10 s and the connection counts as broken. Local drivers
        // (test:///) know no keep-alive and no close, and say so.
        let _ = connect.set_keep_alive(5, 2);
        let opaque = Box::into_raw(Box::new(listener.clone())).cast::<c_void>();
        // SAFETY: the connection is open; `closed::<L>` matches virConnectCloseFunc and is
        // given the Box<L> that `free::<L>` takes back when libvirt drops the callback.
        let registered = unsafe {
            sys::virConnectRegisterCloseCallback(
                connect.as_ptr(),
                Some(closed::<L>),
                opaque,
                Some(free::<L>),
            )
        };
        if registered < 0 {
            // SAFETY: libvirt took neither the callback nor its argument.
            drop(unsafe { Box::from_raw(opaque.cast::<L>()) });
        }
        let mut watched = Self { connect, lifecycle: -1 };
        let opaque = Box::into_raw(Box::new(listener)).cast::<c_void>();
        // SAFETY: for VIR_DOMAIN_EVENT_ID_LIFECYCLE libvirt calls the function with the
        // arguments of virConnectDomainEventCallback; its own macro
        // VIR_DOMAIN_EVENT_CALLBACK makes the same cast.
        watched.lifecycle = unsafe {
            let callback: unsafe extern "C" fn(
                sys::virConnectPtr,
                sys::virDomainPtr,
                c_int,
                c_int,
                *mut c_void,
            ) -> c_int = lifecycle::<L>;
            let generic: unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *mut c_void) =
                std::mem::transmute(callback);
            sys::virConnectDomainEventRegisterAny(
                watched.connect.as_ptr(),
                std::ptr::null_mut(),
                sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE as c_int,
                Some(generic),
                opaque,
                Some(free::<L>),
            )
        };
        if watched.lifecycle < 0 {
            let error = Error::last_error();
            // SAFETY: libvirt took neither the callback nor its argument.
            drop(unsafe { Box::from_raw(opaque.cast::<L>()) });
            watched.unregister_close::<L>();
            return Err(error);
        }
        Ok(watched)
    }

    /// The connection itself.
    pub(super) fn connect(&self) -> &Connect {
        &self.connect
    }

    /// Takes both callbacks off and closes; the type is that of [`Watched::open`].
    pub(super) fn close<L: Listener>(self) {
        self.unregister_close::<L>();
        // SAFETY: the connection is open and the id is the one libvirt gave. Fails on a
        // broken connection, where the callback is dropped all the same.
        unsafe { sys::virConnectDomainEventDeregisterAny(self.connect.as_ptr(), self.lifecycle) };
    }

    fn unregister_close<L: Listener>(&self) {
        // SAFETY: the connection is open; the function is the one registered, or none is
        // and libvirt says so.
        unsafe { sys::virConnectUnregisterCloseCallback(self.connect.as_ptr(), Some(closed::<L>)) };
    }
}

unsafe extern "C" fn closed<L: Listener>(
    _connect: sys::virConnectPtr,
    _reason: c_int,
    opaque: *mut c_void,
) {
    // SAFETY: `opaque` is the Box<L> given at registration, freed only by `free::<L>`.
    unsafe { &*opaque.cast::<L>() }.closed();
}

unsafe extern "C" fn lifecycle<L: Listener>(
    _connect: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    event: c_int,
    _detail: c_int,
    opaque: *mut c_void,
) -> c_int {
    let started = event == sys::VIR_DOMAIN_EVENT_STARTED as c_int;
    if !started && event != sys::VIR_DOMAIN_EVENT_STOPPED as c_int {
        return 0;
    }
    let mut uuid = [0 as c_char; UUID_TEXT];
    // SAFETY: libvirt lends `domain` for the length of the call; its name lives as long;
    // the buffer has the length that virDomainGetUUIDString asks for and ends with NUL.
    let (name, uuid) = unsafe {
        let name = sys::virDomainGetName(domain);
        if name.is_null() || sys::virDomainGetUUIDString(domain, uuid.as_mut_ptr()) < 0 {
            return 0;
        }
        (
            CStr::from_ptr(name).to_string_lossy().into_owned(),
            CStr::from_ptr(uuid.as_ptr()).to_string_lossy().into_owned(),
        )
    };
    // SAFETY: `opaque` is the Box<L> given at registration, freed only by `free::<L>`.
    unsafe { &*opaque.cast::<L>() }.domain(if started {
        DomainEvent::Started { name, uuid }
    } else {
        DomainEvent::Stopped { name, uuid }
    });
    0
}

unsafe extern "C" fn free<L>(opaque: *mut c_void) {
    // SAFETY: libvirt calls this once per registration, with the Box<L> given there.
    drop(unsafe { Box::from_raw(opaque.cast::<L>()) });
}
