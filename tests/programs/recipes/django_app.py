"""A Django application in one file: answers with the method, the path, the query and the length of the body."""
from django.conf import settings

settings.configure(ALLOWED_HOSTS=["*"], ROOT_URLCONF=__name__, SECRET_KEY="of a test", DATA_UPLOAD_MAX_MEMORY_SIZE=None)

from django.core.wsgi import get_wsgi_application
from django.http import HttpResponse
from django.urls import re_path


def echo(request):
    query = request.META.get("QUERY_STRING", "")
    return HttpResponse(f"{request.method} {request.path} {query} {len(request.body)}\n", content_type="text/plain")


urlpatterns = [re_path("", echo)]
app = get_wsgi_application()
